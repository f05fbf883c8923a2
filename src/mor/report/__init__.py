"""Reports: tables, plots, one self-contained HTML page, and tokens coloured by depth.

Everything is made from the files of run folders (:mod:`mor.report.records`):

    build_report([Path("runs/vanilla"), Path("runs/mor")], Path("report"))

Plots need the ``report`` extra; tables and terminal colours do not.
"""

from mor.report.build import build_report
from mor.report.colors import render_terminal
from mor.report.find import find_runs
from mor.report.records import Run, Sample, load_run, load_runs
from mor.report.tables import depth_sentence, markdown_table, rich_table

__all__ = [
    "Run",
    "Sample",
    "build_report",
    "depth_sentence",
    "find_runs",
    "load_run",
    "load_runs",
    "markdown_table",
    "render_terminal",
    "rich_table",
]
