"""`mor eval --tasks`: few-shot tasks of lm-eval and their table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.table import Table

from mor.cli.common import write_json
from mor.eval.harness.run import choose_tasks, run_tasks
from mor.provenance import provenance


def evaluate_tasks(
    model: Path, tasks: str, data: Path | None, out: Path | None, as_json: bool, **options: Any
) -> None:
    """Run the tasks, print their scores, write them where asked."""
    chosen = choose_tasks(tasks)
    scores = run_tasks(model, chosen, data=data, **options)
    result = {"model": str(model), "tasks": scores, "options": options} | provenance()
    if out is not None:
        write_json(out, result)
    if as_json:
        typer.echo(json.dumps(result))
    else:
        Console().print(task_table(scores))


def task_table(scores: dict[str, Any]) -> Table:
    """A row for each metric of each task."""
    table = Table("task", "metric", "value", "questions")
    for task, values in scores.items():
        count = values.get("samples")
        for metric, value in values.items():
            if metric != "samples" and "stderr" not in metric:
                table.add_row(task, metric, f"{value:z.4f}", "" if count is None else f"{count:,}")
    return table
