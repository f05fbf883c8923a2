"""Where a run begins: its folder, the checkpoint it goes on from, and whether the two fit."""

from __future__ import annotations

import hashlib
import shutil
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from mor.data import PackedDataset
from mor.train.plan.budget import Plan
from mor.train.recipe.recipe import Recipe
from mor.train.state import checkpoints
from mor.train.state.branches import check_facts, check_source
from mor.train.state.run_folder import CHECKPOINTS, LOG, claim, held


def starting_point(
    recipe: Recipe,
    plan: Plan,
    facts: dict[str, Any],
    stack: ExitStack,
    first: bool,
    resume: bool,
    overwrite: bool,
    resume_from: str | Path | None,
) -> Path | None:
    """Take the run folder, and say which checkpoint to begin from.

    The first rank checks every file; the others, which come after it, take the same one.

    Args:
        recipe, plan: what is trained.
        facts: what the manifests of this run say (:func:`mor.train.state.branches.check_facts`).
        stack: holds the folder until it is closed.
        first: whether this is the rank that writes.
        resume, overwrite, resume_from: as for :func:`mor.train.train`.

    Returns:
        A checkpoint of this run, or the one that it branches off; None to begin at step 0.

    Raises:
        MorError: the folder cannot be taken, or the checkpoint is damaged or does not fit.
    """
    folder = recipe.run_dir / CHECKPOINTS
    resumes = resume or resume_from is not None
    source = recipe.train.branch_from
    source = source and source.expanduser()
    if not first:
        own = checkpoints.found(folder) if resumes else []
        return own[-1] if own else source
    if source is not None and not (resumes and checkpoints.found(folder)):
        source = check_source(recipe, plan.steps, facts)
    already = recipe.run_dir.is_dir()
    stack.enter_context(held(recipe.run_dir))
    checkpoint = claim(
        recipe,
        resume=resume,
        overwrite=overwrite,
        resume_from=resume_from,
        sequences_per_step=facts["sequences_per_step"],
    )
    if not already:
        stack.enter_context(held(recipe.run_dir))
    if checkpoint is not None:
        check_facts(checkpoint, facts)
        print(f"{recipe.name}: goes on from {checkpoint.name}", file=sys.stderr)
        return checkpoint
    if resumes:
        print(f"{recipe.name}: no checkpoint yet, begins anew", file=sys.stderr)
    (recipe.run_dir / LOG).unlink(missing_ok=True)
    if source is not None and (source.parent.parent / LOG).is_file():
        shutil.copyfile(source.parent.parent / LOG, recipe.run_dir / LOG)
    return source


def data_digest(parts: Sequence[PackedDataset]) -> str:
    """One number for the tokens of the training split of every folder, and their order."""
    shards = [shard.sha256 for part in parts for shard in part.index.shards(part.split)]
    return hashlib.sha256(" ".join(shards).encode()).hexdigest()
