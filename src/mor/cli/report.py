"""``mor report``: tables, plots and a page from run folders."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from mor.report import Run, build_report, depth_sentence, find_runs, load_runs, rich_table
from mor.report.tables import notes


def report(
    runs: Annotated[
        list[Path],
        typer.Argument(help="run folders, trained and evaluated; what is no run is skipped"),
    ],
    out: Annotated[Path, typer.Option(help="folder to write")],
    title: Annotated[str, typer.Option(help="heading of the page")] = "Mixture-of-Recursions runs",
) -> None:
    """Write table.md, table.csv, results.jsonl, plots and one self-contained index.html."""
    found, said = find_runs(runs)
    for line in said:
        typer.echo(line, err=True)
    loaded = load_runs(found)
    page = build_report(found, out, title=title)
    show_runs(loaded)
    bare = [run.label for run in loaded if run.eval is None]
    if bare:
        typer.echo(
            f"not evaluated: {', '.join(bare)}; mor eval RUN --data DIR keeps what it finds there",
            err=True,
        )
    typer.echo(f"report: {page}")


def show_runs(runs: list[Run]) -> None:
    """Print the table, what depth buys, and what to know before comparing."""
    console = Console(highlight=False)
    console.print(rich_table(runs))
    for line in [*map(depth_sentence, runs), *notes(runs)]:
        console.print(line)
