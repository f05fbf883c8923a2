"""One run, several budgets: cool-downs that branch off the stable phase of a longer run.

Between warm-up and cool-down the trapezoid is flat, so a run says nothing about its length yet. A
branch takes the whole state of such a checkpoint (weights, optimiser, router, random states, place
in the data) and cools down to a budget of its own. The paper trains its budgets this way: warm-up
5% of the smallest, cool-down 20% of each, branched off the longest.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from mor.errors import MorError
from mor.run_files import CHECKPOINTS, RECIPE
from mor.train.plan.depth import first_difference
from mor.train.recipe.fields import fields_that_decide
from mor.train.recipe.recipe import Recipe
from mor.train.recipe.sections import RecipeError, TrainSection
from mor.train.state import checkpoints
from mor.train.state.content import read_progress
from mor.train.state.differences import (
    describe_changes,
    find_differences,
    find_optimiser_changes,
    read_recipe,
)
from mor.train.step.optimiser import trapezoid


def expand_branches(recipe: Recipe, steps: list[int]) -> list[Recipe]:
    """The run of the whole budget, then its branches from the shortest to the longest.

    Args:
        recipe: with ``train.branches``.
        steps: optimiser steps of ``train.budget``, then those of each branch.

    Raises:
        RecipeError: a branch is not shorter than the run, or equals another, or its cool-down
            begins within the warm-up.
    """
    section = recipe.train
    whole, shorter = steps[0], sorted(steps[1:])
    for number in shorter:
        if number >= whole or shorter.count(number) > 1:
            raise RecipeError(
                f"train.branches holds a budget of {number} steps; each must differ from the "
                f"others and be shorter than train.budget, {whole} steps"
            )
    warmup = section.warmup_steps
    if warmup is None:
        warmup = trapezoid(section, shorter[0])[0]
    section = section.model_copy(update={"warmup_steps": warmup})
    starts = {number: number - trapezoid(section, number)[1] for number in shorter}
    for number, start in starts.items():
        if start < max(1, warmup):
            raise RecipeError(
                f"train.branches: {number} steps leave no stable phase between the warm-up of "
                f"{warmup} and the cool-down from step {start} on; lower train.decay_fraction or "
                "raise the budget"
            )
        differs = first_difference(section, whole, section, number, start)
        if differs is not None:
            raise RecipeError(
                f"train.branches: under train.depth_schedule a run of {number} steps has other "
                f"depth caps than one of {whole}, from step {differs} on; leave branches out, or "
                "use depth_schedule: random"
            )
    kept = sorted({*section.keep_steps, *starts.values()})
    trunk = recipe.model_copy(
        update={"train": section.model_copy(update={"branches": [], "keep_steps": kept})}
    )
    parts = [trunk]
    for number, start in starts.items():
        source = trunk.run_dir / CHECKPOINTS / f"checkpoint-{start}"
        raw = recipe.model_dump(mode="json")
        raw["name"] = f"{recipe.name}-{number}"
        raw["train"] |= {
            "budget": {"steps": number},
            "branches": [],
            "warmup_steps": warmup,
            "branch_from": str(source),
        }
        parts.append(Recipe.model_validate(raw))
    return parts


def check_source(recipe: Recipe, steps: int, facts: dict[str, Any]) -> Path:
    """The checkpoint that ``train.branch_from`` names, once it is sure that it fits.

    Args:
        recipe: of the branch.
        steps: optimiser steps of the branch, those of its source included.
        facts: what the manifest of a checkpoint of this recipe would say.

    Raises:
        MorError: it is no checkpoint of a run, it is damaged, it was trained by another recipe, on
            other data or batches, or it does not lie in the stable phase of both schedules.
    """
    assert recipe.train.branch_from is not None
    source = recipe.train.branch_from.expanduser()
    run_dir, step = source.parent.parent, checkpoints.step_of(source)
    if step < 0 or not source.is_dir() or not (run_dir / RECIPE).is_file():
        have = (
            ", ".join(str(p) for p in checkpoints.list_checkpoints(source / CHECKPOINTS))
            or "none there"
        )
        raise MorError(
            f"train.branch_from={str(source)!r} must be RUN/checkpoints/checkpoint-N of a run; "
            f"checkpoints: {have}"
        )
    if run_dir.resolve() == recipe.run_dir.resolve():
        raise MorError(
            f"the branch would be written over {run_dir}, which it comes from; give it another name"
        )
    wrong = checkpoints.damage(source)
    if wrong is not None:
        raise MorError(f"{source} is damaged: {wrong}; branch off another checkpoint")
    theirs = read_recipe(run_dir / RECIPE)
    changed = find_differences(theirs, recipe)
    # Another optimiser is the way on for a run whose loss is no longer finite. The branch is then
    # not the run that had this budget from the start; its summary says what was changed.
    tuned = find_optimiser_changes(theirs, recipe)
    if tuned:
        print(f"{recipe.name}: other than {source}: {describe_changes(tuned)}", file=sys.stderr)
    free = fields_that_decide(TrainSection, "length")
    if checkpoints.manifest(source):  # it knows how many sequences a step has
        free |= fields_that_decide(TrainSection, "batch split")
    allowed = {f"train.{name}" for name in free} | set(tuned)
    changed = {name: pair for name, pair in changed.items() if name not in allowed}
    if changed:
        raise MorError(f"{source} was trained by another recipe: {describe_changes(changed)}")
    check_facts(source, facts)
    total = read_progress(source).max_steps
    if step > total:
        raise MorError(f"{source} lies beyond the {total} steps of its run")
    up, down = trapezoid(theirs.train, total)
    if not up <= step <= total - down:
        raise MorError(
            f"{source} lies in the {'warm-up' if step < up else 'cool-down'} of its run, whose "
            f"rate is stable from step {up} to {total - down}; branch off a checkpoint there"
        )
    differs = first_difference(theirs.train, total, recipe.train, steps, step)
    if differs is not None:
        raise MorError(
            f"{source} was trained under other depth caps than train.depth_schedule gives this "
            f"budget, from step {differs} on; branch off a checkpoint before that step, or train a "
            "run of its own"
        )
    own_up, own_down = trapezoid(recipe.train, steps)
    if step > steps - own_down:
        raise MorError(
            f"{source} lies past step {steps - own_down}, where a budget of {steps} steps begins "
            "to cool down; branch off an earlier checkpoint or raise train.budget"
        )
    if step < own_up:
        raise MorError(
            f"{source} lies within the {own_up} steps of warm-up that this budget would have; set "
            f"train.warmup_steps={up} as in the run it comes from"
        )
    return source


def check_facts(checkpoint: Path, facts: dict[str, Any]) -> None:
    """Refuse a checkpoint whose manifest disagrees with ``facts``.

    Raises:
        MorError: other data, or another number of sequences per step.
    """
    theirs = checkpoints.manifest(checkpoint)
    name, ours = "sequences_per_step", facts["sequences_per_step"]
    if theirs.get(name, ours) != ours:
        raise MorError(
            f"{checkpoint} was trained on {theirs[name]} sequences per step, this run would take "
            f"{ours}: train.batch_size x train.gradient_accumulation_steps x processes must stay "
            f"{theirs[name]}"
        )
    if theirs.get("data", facts["data"]) != facts["data"]:
        raise MorError(
            f"{checkpoint} was trained on other data than data.path holds now; the tokens of the "
            "training split must be the same"
        )
