"""The report of a study: JSON lines, tables in Markdown, plots, one page of HTML."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mor.errors import MorError
from mor.study.file import Study
from mor.study.pages import Pages, write_pages
from mor.study.plots import draw_study
from mor.study.tables import comparison, grid_tables, law_table

Record = dict[str, Any]


def write_report(study: Study, records: Sequence[Record], out: Path) -> Path:
    """Write `results.jsonl`, `report.md`, PNG plots and `index.html`, the page last.

    Args:
        study: what was asked.
        records: of `run_study`, at least one.
        out: folder; its parents are made.

    Returns:
        The path of `index.html`.

    Raises:
        MorError: there is no record, matplotlib is not installed, or `out` cannot be written.
    """
    if not records:
        raise MorError(f"the study {study.title!r} has no finished run to report")
    law = law_table(records)
    tables = [comparison(study, records), *grid_tables(study, records), *([law] if law else [])]
    return write_pages(Pages(study.title, study.note, tables, draw_study(records)), records, out)
