"""``mor train``."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from mor.cli.card import card_after_training
from mor.cli.plan import planned_parts, show_plan
from mor.cli.ranks import first_rank, say
from mor.errors import MorError
from mor.train import load_recipe
from mor.train import train as run_training
from mor.train.run import with_branches


def train(
    recipe: Annotated[str, typer.Argument(help="a YAML file, or a name from `mor recipes`")],
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="change a field: train.learning_rate=1e-3")
    ] = None,
    resume: Annotated[bool, typer.Option(help="continue from the newest checkpoint")] = False,
    resume_from: Annotated[
        str | None, typer.Option(help="continue from this one: checkpoint-40; newer are set aside")
    ] = None,
    branch_from: Annotated[
        str | None, typer.Option(help="begin from a stable RUN/checkpoints/checkpoint-N")
    ] = None,
    overwrite: Annotated[bool, typer.Option(help="replace the run folder")] = False,
    dry_run: Annotated[bool, typer.Option(help="check and print the plan, train nothing")] = False,
    measure: Annotated[
        bool, typer.Option(help="with --dry-run: time a few steps on this machine")
    ] = False,
    data_tokens: Annotated[
        int | None,
        typer.Option(min=1, help="with --dry-run, before the data is there: its training tokens"),
    ] = None,
) -> None:
    """Train what RECIPE says; leaves a run folder with model, model card, log and summary."""
    branch = [] if branch_from is None else [f"train.branch_from={json.dumps(branch_from)}"]
    loaded = load_recipe(recipe, [*(set_ or []), *branch])
    if dry_run:
        if first_rank():
            for part in planned_parts(loaded, data_tokens):
                show_plan(part, measure=measure, data_tokens=data_tokens)
        return
    parts = with_branches(loaded)
    if measure:
        raise MorError("--measure belongs to --dry-run; a run measures its speed by itself")
    if data_tokens is not None:
        raise MorError("--data-tokens belongs to --dry-run; a run counts the tokens of its data")
    run_training(loaded, resume=resume, overwrite=overwrite, resume_from=resume_from)
    for part in parts:
        card_after_training(part.run_dir)
        say(f"trained: {part.run_dir}")
