"""One run, several budgets: cool-downs that branch off the stable phase of a longer run.

Between warm-up and cool-down the trapezoid is flat, so a run says nothing about its length yet. A
branch takes the whole state of such a checkpoint (weights, optimiser, router, random states, place
in the data) and cools down to a budget of its own. The paper trains its budgets this way: warm-up
5% of the smallest, cool-down 20% of each, branched off the longest.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from mor.errors import MorError
from mor.train.arguments import trapezoid
from mor.train.recipe.recipe import Recipe
from mor.train.recipe.sections import RecipeError
from mor.train.state import checkpoints
from mor.train.state.run_folder import RECIPE, differences, read_recipe, told

# A branch may differ from its source in these.
_OWN = {"budget", "warmup_fraction", "warmup_steps", "decay_fraction", "branch_from", "branches"}
# And in these, when it is told so: the way on for a run whose loss left the numbers. It is then no
# longer the run that had this budget from the start, and its summary says what was changed.
_TUNED = {"learning_rate", "weight_decay", "max_grad_norm", "auxiliary_router_lr_factor"}
_TUNED |= {"adam_beta1", "adam_beta2", "adam_epsilon"}


def fan(recipe: Recipe, steps: list[int]) -> list[Recipe]:
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
    kept = sorted({*section.keep_steps, *starts.values()})
    trunk = recipe.model_copy(
        update={"train": section.model_copy(update={"branches": [], "keep_steps": kept})}
    )
    parts = [trunk]
    for number, start in starts.items():
        source = trunk.run_dir / "checkpoints" / f"checkpoint-{start}"
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
        have = ", ".join(str(p) for p in checkpoints.found(source / "checkpoints")) or "none there"
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
    changed = differences(theirs, recipe)
    tuned = retuned(theirs, recipe)
    if tuned:
        print(f"{recipe.name}: other than {source}: {told(tuned)}", file=sys.stderr)
    split = {"train.batch_size", "train.gradient_accumulation_steps"}
    allowed = {f"train.{name}" for name in _OWN} | (
        split if checkpoints.manifest(source) else set()
    )
    changed = {n: pair for n, pair in changed.items() if n not in allowed and n not in tuned}
    if changed:
        raise MorError(f"{source} was trained by another recipe: {told(changed)}")
    check_facts(source, facts)
    total = _steps_of(source)
    if step > total:
        raise MorError(f"{source} lies beyond the {total} steps of its run")
    up, down = trapezoid(theirs.train, total)
    if not up <= step <= total - down:
        raise MorError(
            f"{source} lies in the {'warm-up' if step < up else 'cool-down'} of its run, whose "
            f"rate is stable from step {up} to {total - down}; branch off a checkpoint there"
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


def retuned(theirs: Recipe, ours: Recipe) -> dict[str, tuple[Any, Any]]:
    """What a branch changes of the optimiser: dotted name to the two values."""
    tuned = {f"train.{name}" for name in _TUNED}
    return {n: pair for n, pair in differences(theirs, ours).items() if n in tuned}


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


def _steps_of(checkpoint: Path) -> int:
    """Optimiser steps that the run of ``checkpoint`` was planned for."""
    state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    return int(state["max_steps"])
