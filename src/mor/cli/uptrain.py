"""``mor uptrain``: train on from a model that is there."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mor.cli.card import card_after_training
from mor.cli.plan import planned_parts, show_plan
from mor.cli.ranks import first_rank, say
from mor.errors import MorError
from mor.run_files import MODEL, SUMMARY
from mor.train import Recipe, load_recipe
from mor.train import train as run_training


def uptrain(
    recipes: Annotated[
        list[str],
        typer.Argument(help="YAML files or names from `mor recipes`; several: stages in order"),
    ],
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", help="change a field of every recipe: train.learning_rate=1e-3"),
    ] = None,
    resume: Annotated[
        bool, typer.Option(help="continue from the newest checkpoints; finished stages are kept")
    ] = False,
    overwrite: Annotated[bool, typer.Option(help="replace the run folders")] = False,
    dry_run: Annotated[bool, typer.Option(help="check and print the plan, train nothing")] = False,
) -> None:
    """Train on from a folded model, or any other, with a teacher if the recipe names one."""
    loaded = [load_recipe(name, set_ or []) for name in recipes]
    for recipe in loaded:
        if recipe.uptrain is None:
            raise MorError(
                f"recipe {recipe.name!r} has no section uptrain; mor train trains from nothing"
            )
    names = [recipe.run_dir for recipe in loaded]
    if len(set(names)) < len(names):
        raise MorError(f"stages share the run folder {names[0]}; give each a name of its own")
    for number, recipe in enumerate(loaded):
        if dry_run and (start := _made_later(recipe, loaded[:number])) is not None:
            say(f"{recipe.name}: its plan is known once {start} is there")
            continue
        if dry_run:
            if first_rank():
                show_plan(planned_parts(recipe)[0])
            continue
        going = resume and recipe.run_dir.exists()
        if going and len(loaded) > 1 and (recipe.run_dir / SUMMARY).is_file():
            continue
        folder = run_training(
            recipe, resume=going or (resume and len(loaded) == 1), overwrite=overwrite
        )
        card_after_training(folder)
        say(f"trained: {folder}")


def _made_later(recipe: Recipe, before: list[Recipe]) -> Path | None:
    """The folder that the recipe starts from, if an earlier stage has yet to make it."""
    assert recipe.uptrain is not None
    start = recipe.uptrain.start.expanduser()
    later = any(start == stage.run_dir for stage in before) and not (start / MODEL).exists()
    return start if later else None
