"""``summary.json``: what was trained, at what cost, by which code on which machine."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from mor.config import MoRConfig
from mor.model.flops import count_parameters
from mor.provenance import provenance
from mor.run_files import RECIPE
from mor.train.plan.budget import PlannedFlops
from mor.train.recipe.recipe import Recipe
from mor.train.state import checkpoints
from mor.train.state.differences import find_optimiser_changes, read_recipe
from mor.train.uptrain.costs import uptrain_costs


def summarise(
    recipe: Recipe,
    config: MoRConfig,
    steps: int,
    flops: PlannedFlops,
    last_logged: Callable[[str], Any],
    peak_memory_bytes: int | None,
) -> dict[str, Any]:
    """The record of a finished run.

    Args:
        recipe: what was trained.
        config: of the model.
        steps: optimiser steps done, those of a branch's source included.
        flops: what the steps cost.
        last_logged: the newest value of a name in the log.
        peak_memory_bytes: of this process or its GPU.
    """
    parameters, non_embedding = count_parameters(config)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "name": recipe.name,
        "family": config.family,
        "router": config.router,
        "num_recursions": config.num_recursions,
        "capacities": config.router_capacities,
        "parameters": parameters,
        "non_embedding_parameters": non_embedding,
        "tokens": steps * flops.tokens_per_step,
        "steps": steps,
        "train_flops": flops.until(steps),
        "eval_nll": last_logged("eval_loss"),
        "wall_s": last_logged("elapsed_s"),
        "tokens_per_s": last_logged("tokens_per_s"),
        "mfu": last_logged("mfu"),
        "peak_memory_bytes": peak_memory_bytes,
        "seed": recipe.train.seed,
        "seq_len": recipe.data.seq_len,
        "dtype": recipe.train.dtype,
        "threads": torch.get_num_threads(),
        **_summarise_branch(recipe, steps, flops),
        **_summarise_uptraining(recipe, config, steps, flops),
    } | provenance(device)


def _summarise_branch(recipe: Recipe, steps: int, flops: PlannedFlops) -> dict[str, Any]:
    origin = recipe.train.branch_from
    if origin is None:
        return {}
    shared = checkpoints.step_of(origin)
    return {
        "branched_from": str(origin),
        "branch_changes": _find_changes(recipe, origin),
        "branched_at_step": shared,
        # What this run trained itself; every other count holds the shared steps too.
        "own_tokens": (steps - shared) * flops.tokens_per_step,
        "own_flops": flops.until(steps) - flops.until(shared),
    }


def _find_changes(recipe: Recipe, origin: Path) -> dict[str, Any] | None:
    """What a branch changed of the optimiser; None where its source is gone since."""
    path = origin.expanduser().parent.parent / RECIPE
    if not path.is_file():
        return None
    return {n: pair[1] for n, pair in find_optimiser_changes(read_recipe(path), recipe).items()}


def _summarise_uptraining(
    recipe: Recipe, config: MoRConfig, steps: int, flops: PlannedFlops
) -> dict[str, Any]:
    up = recipe.uptrain
    if up is None:
        return {}
    costs = uptrain_costs(recipe, config)
    spent = costs.teacher_flops * steps * flops.tokens_per_step
    return {
        "started_from": str(up.start),
        "teacher": None if up.distill is None else str(up.distill.teacher),
        "trained_parameters": costs.trained,
        # Where it is cached another run may have paid, or will gain.
        "teacher_flops": None if costs.cached else spent,
    }
