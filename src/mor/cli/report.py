"""``mor report``: tables, plots and a page from run folders."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from mor.report import Run, build_report, depth_sentence, load_runs, rich_table
from mor.report.tables import notes


def report(
    runs: Annotated[list[Path], typer.Argument(help="run folders, trained and evaluated")],
    out: Annotated[Path, typer.Option(help="folder to write")],
    title: Annotated[str, typer.Option(help="heading of the page")] = "Mixture-of-Recursions runs",
) -> None:
    """Write table.md, table.csv, results.jsonl, plots and one self-contained index.html."""
    loaded = load_runs(runs)
    page = build_report(runs, out, title=title)
    show_runs(loaded)
    typer.echo(f"report: {page}")


def show_runs(runs: list[Run]) -> None:
    """Print the table, what depth buys, and what to know before comparing."""
    console = Console(highlight=False)
    console.print(rich_table(runs))
    for line in [*map(depth_sentence, runs), *notes(runs)]:
        console.print(line)
