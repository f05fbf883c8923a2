"""``mor study``: a set of trainings and evaluations, and one report."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from mor.checks import check_real
from mor.cli.plan import duration
from mor.report.style import require_matplotlib
from mor.study.cost import Cost, missing_data, plan_study
from mor.study.file import builtin_studies, load_study
from mor.study.launchers import make_launcher
from mor.study.report import write_report
from mor.study.runs import StudyFailed, run_study

console = Console(highlight=False)


def study(
    source: Annotated[
        str | None, typer.Argument(help="a YAML file, or the name of a study that comes along")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="folder for runs and report; default runs/study/NAME")
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="prepared folder to train on, in place of the file's")
    ] = None,
    workers: Annotated[
        int | None, typer.Option(min=1, help="trainings at a time; default one per core or GPU")
    ] = None,
    launcher: Annotated[
        str, typer.Option(help="where trainings run: process (here), slurm (a job array) or ray")
    ] = "process",
    launcher_option: Annotated[
        list[str] | None,
        typer.Option(help="of slurm: an option of sbatch, partition=gpu; of ray: num_gpus=1"),
    ] = None,
    scale: Annotated[float, typer.Option(help="multiply every budget")] = 1.0,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", help="change a field: base.train.learning_rate=1e-3"),
    ] = None,
    dry_run: Annotated[bool, typer.Option(help="check and print the plan and its cost")] = False,
    flops_per_s: Annotated[
        float | None, typer.Option(help="with --dry-run: model FLOPs per second of one worker")
    ] = None,
) -> None:
    """Train and evaluate what a study file says; one report, the paper's numbers beside ours.

    Safe to stop at any time: the same command goes on, and keeps what is done. Without SOURCE, the
    studies that come along are listed.
    """
    if source is None:
        for name in builtin_studies():
            typer.echo(f"{name}: {load_study(name).title}")
        return
    check_real("scale", scale, 0.0, open_low=True)
    changes = [] if data is None else [f"base.data.path={data}"]
    loaded = load_study(source, [*changes, *(set_ or [])])
    folder = Path("runs/study") / Path(source).stem if out is None else out
    if dry_run:
        if launcher not in ("slurm", "ray"):  # those need not be here for a plan
            make_launcher(launcher, folder, workers, launcher_option or [])
        show_cost(plan_study(loaded, folder, scale), flops_per_s, workers or 1)
        if note := missing_data(loaded, folder):
            typer.echo(note)
        return
    require_matplotlib()
    try:
        records = run_study(
            loaded, folder, scale=scale, tell=partial(console.print, markup=False, soft_wrap=True),
            launcher=make_launcher(launcher, folder, workers, launcher_option or []),
        )  # fmt: skip
    except StudyFailed as failure:
        if failure.records:
            page = write_report(loaded, failure.records, folder / "report")
            console.print(f"report of what is done: {page}")
        raise
    page = write_report(loaded, records, folder / "report")
    report = (folder / "report" / "report.md").read_text(encoding="utf-8")
    console.print(report, markup=False, soft_wrap=True)
    console.print(f"report: {page}")


def show_cost(costs: Sequence[Cost], flops_per_s: float | None, workers: int) -> None:
    """Print a line for each training, and the sum."""
    table = Table("training", "runs", "parameters", "tokens", "FLOPs")
    for cost in costs:
        table.add_row(
            cost.name, str(cost.runs), f"{cost.parameters:,}", f"{cost.tokens:,}",
            f"{cost.flops:.3g}",
        )  # fmt: skip
    total = sum(cost.flops for cost in costs)
    tokens = sum(cost.tokens for cost in costs)
    table.add_row("all", str(sum(cost.runs for cost in costs)), "", f"{tokens:,}", f"{total:.3g}")
    Console().print(table)
    if flops_per_s is not None:
        check_real("flops_per_s", flops_per_s, 0.0, open_low=True)
        seconds = total / flops_per_s / workers
        typer.echo(
            f"about {duration(seconds)} with {workers} at a time and {flops_per_s:.3g} FLOPs/s "
            "each, without evaluation"
        )
