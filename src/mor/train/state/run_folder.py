"""The run folder (:mod:`mor.run_files`): who may write it, which checkpoint to go on from."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from mor.disk import lock, write_whole
from mor.errors import MorError
from mor.run_files import CHECKPOINTS, EVAL, LOG, MODEL, RECIPE, SUMMARY, TENSORBOARD
from mor.train.recipe.file import dump_recipe
from mor.train.recipe.recipe import Recipe, parse_recipe
from mor.train.state import checkpoints

_OURS = {RECIPE, LOG, SUMMARY, MODEL, CHECKPOINTS, TENSORBOARD, EVAL}
# What may differ between the parts of one run: it changes no weight.
_FREE = {
    "data": {"path", "verify", "validation_path"},
    "uptrain": {"start"},
    "train": {
        "logging_steps",
        "eval_steps",
        "eval_sequences",
        "save_steps",
        "save_total_limit",
        "keep_every",
        "keep_steps",
        "num_workers",
        "threads",
        "peak_flops",
        "report_to",
        "gradient_checkpointing",
        "compile",
        "parallel",
        "fsdp_regather",
    },
}


PATIENCE_S = 20.0  # data workers outlive a killed run by some seconds


@contextmanager
def held(run_dir: Path) -> Iterator[None]:
    """Keep every other process from training in this folder; a kill lets go of it.

    Where the file system knows no locks, nothing is kept. The folder need not exist yet.

    Raises:
        MorError: another process trains here.
    """
    if not run_dir.is_dir():
        yield
        return
    busy = (
        f"{run_dir} is being written by another process; stop that one, or choose another name or "
        "output"
    )
    with lock(run_dir, busy, PATIENCE_S):
        yield


def claim(
    recipe: Recipe,
    *,
    resume: bool,
    overwrite: bool,
    resume_from: str | Path | None = None,
    sequences_per_step: int | None = None,
) -> Path | None:
    """Make the run folder ours and write the recipe into it.

    Args:
        recipe: what is to be trained.
        resume: go on from the newest checkpoint.
        overwrite: replace a run that is there.
        resume_from: go on from this checkpoint of the run instead.
        sequences_per_step: over all ranks; lets a resumed run split its batch another way.

    Returns:
        The checkpoint to resume from; None to begin at step 0.

    Raises:
        MorError: the run is there already, or there is nothing to resume, or another recipe made
            it, or the checkpoint is damaged, or ``overwrite`` would remove files that no run has
            written.
    """
    run_dir = recipe.run_dir
    checkpoint = None
    if resume or resume_from is not None:
        folder = run_dir / CHECKPOINTS
        _check_same(recipe, sequences_per_step)
        checkpoints.recover(folder)
        if resume_from is not None:
            checkpoint = checkpoints.chosen(folder, resume_from)
        else:
            checkpoint = checkpoints.newest(folder)
    elif run_dir.exists() and (not run_dir.is_dir() or any(run_dir.iterdir())):
        if not overwrite:
            raise MorError(
                f"{run_dir} already holds a run; use --resume, --overwrite or another name"
            )
        _remove(run_dir)
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        write_whole(run_dir / RECIPE, dump_recipe(recipe))
    except OSError as error:
        raise MorError(f"{run_dir} cannot be written: {error.strerror or error}") from None
    return checkpoint


def _remove(run_dir: Path) -> None:
    names = sorted(entry.name for entry in run_dir.iterdir()) if run_dir.is_dir() else [""]
    foreign = [name for name in names if name.removesuffix(".partial") not in _OURS]
    if foreign:
        raise MorError(
            f"{run_dir} holds {foreign[0] or 'a file, not a folder'}, which no run has written; "
            "overwrite removes whole run folders only: choose another name or output"
        )
    (run_dir / RECIPE).unlink(missing_ok=True)  # first: half of a run is no run
    for entry in run_dir.iterdir():  # not the folder itself: we hold it
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()


def _check_same(recipe: Recipe, sequences_per_step: int | None) -> None:
    """Refuse to go on with another recipe than the one that began.

    Raises:
        MorError: there is no run, it is finished, or fields differ that change the weights.
    """
    run_dir = recipe.run_dir
    if (run_dir / SUMMARY).is_file():
        raise MorError(f"{run_dir} holds a finished run; nothing is left to resume")
    path = run_dir / RECIPE
    if not path.is_file():
        if run_dir.is_dir() and all(p.name.endswith(".partial") for p in run_dir.iterdir()):
            return  # killed while it began
        raise MorError(f"{run_dir} holds no run to resume; start without --resume")
    began = read_recipe(path)
    changed = differences(began, recipe)
    if _same_batch(began, recipe, sequences_per_step):
        changed = {name: pair for name, pair in changed.items() if name not in _SPLIT}
    if changed:
        hint = "resume with the same"
        if set(changed) == {"train.budget"}:
            hint = "resume with the same, or branch off with --branch-from and another name"
        raise MorError(f"{run_dir} was begun with another recipe: {told(changed)}; {hint}")


def read_recipe(path: Path) -> Recipe:
    """The recipe that a run folder keeps.

    Raises:
        MorError: it is not there, or cannot be read.
    """
    try:
        return parse_recipe(yaml.safe_load(path.read_text(encoding="utf-8")), str(path))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise MorError(f"{path} cannot be read: {error}") from None


def differences(began: Recipe, now: Recipe) -> dict[str, tuple[Any, Any]]:
    """Fields that decide the weights and differ: dotted name to the two values."""
    old, new = _decisive(began), _decisive(now)
    names = sorted(old | new)
    return {n: (old.get(n), new.get(n)) for n in names if old.get(n) != new.get(n)}


def told(changed: dict[str, tuple[Any, Any]]) -> str:
    """The first differences in words."""
    pairs = list(changed.items())[:3]
    return ", ".join(f"{name}={new!r} was {old!r}" for name, (old, new) in pairs)


_SPLIT = {"train.batch_size", "train.gradient_accumulation_steps"}


def _same_batch(began: Recipe, now: Recipe, sequences_per_step: int | None) -> bool:
    """Whether a step still sees as many sequences, only split another way."""
    found = checkpoints.found(now.run_dir / CHECKPOINTS)
    try:
        before = checkpoints.manifest(found[-1]).get("sequences_per_step") if found else None
    except MorError:
        before = None  # damaged: said later, by name
    if before is not None and sequences_per_step is not None:
        return bool(before == sequences_per_step)
    return began.sequences_per_step() == now.sequences_per_step()


def _decisive(recipe: Recipe) -> dict[str, Any]:
    """Fields that decide the weights, by dotted name."""
    flat = {}
    free: dict[str, set[str]] = {"model": set(), **_FREE}
    if recipe.train.global_batch_size is not None:  # how a step's batch is cut up does not matter
        free["train"] = free["train"] | {"batch_size", "gradient_accumulation_steps"}
    for section in ("model", "data", "train", "uptrain"):
        content = recipe.model_dump(mode="json")[section] or {}
        for name, value in content.items():
            if name == "mixture" and value:
                value = [part["weight"] for part in value]  # folders may move, as data.path may
            if name not in free[section]:
                flat[f"{section}.{name}"] = value
    return flat
