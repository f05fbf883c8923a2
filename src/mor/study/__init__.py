"""Studies: sets of trainings and evaluations from one file, and one report."""

from mor.study.file import Study, builtin_studies, load_study
from mor.study.law import fit_recurrence_law
from mor.study.report import write_report
from mor.study.runs import run_study

__all__ = [
    "Study",
    "builtin_studies",
    "fit_recurrence_law",
    "load_study",
    "run_study",
    "write_report",
]
