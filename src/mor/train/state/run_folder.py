"""The run folder (:mod:`mor.run_files`): who may write it, where a run begins, what it leaves."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch

from mor.disk import lock, replace_folder, write_whole
from mor.errors import MorError
from mor.run_files import CHECKPOINTS, EVAL, LOG, MODEL, RECIPE, SUMMARY, TENSORBOARD
from mor.train.recipe.fields import fields_that_decide
from mor.train.recipe.file import dump_recipe
from mor.train.recipe.recipe import Recipe
from mor.train.recipe.sections import TrainSection
from mor.train.state import checkpoints
from mor.train.state.branches import check_facts, check_source
from mor.train.state.differences import describe_changes, find_differences, read_recipe
from mor.train.state.saving import save_checkpoint

_OURS = {RECIPE, LOG, SUMMARY, MODEL, CHECKPOINTS, TENSORBOARD, EVAL}
PATIENCE_S = 20.0  # data workers outlive a killed run by some seconds


@contextmanager
def lock_run_folder(run_dir: Path) -> Iterator[None]:
    """Keep every other process from training in this folder; a kill lets go of it.

    Where the file system knows no locks, nothing is locked. The folder need not exist yet.

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


class RunFolder:
    """The folder of one run, locked while the ``with`` block runs.

        with RunFolder(recipe, facts) as folder:
            checkpoint = folder.begin(steps, resume=True)
            ...
            folder.save(step, write)
            folder.publish_model(write)
            folder.publish_summary(record)

    Every rank makes one; the first rank alone takes the lock, checks and writes.

    Args:
        recipe: what is trained.
        facts: what the manifests of this run's checkpoints say, and a later part of the run must
            agree with: ``sequences_per_step``, ``data`` and the like.
        first: whether this is the rank that writes.
        device: of this rank, for what the ranks ask each other.

    Attributes:
        path: the folder.
        checkpoints: the folder of its checkpoints.
        log: its ``log.jsonl``.
    """

    def __init__(
        self,
        recipe: Recipe,
        facts: dict[str, Any],
        *,
        first: bool = True,
        device: torch.device | None = None,
    ) -> None:
        self.recipe, self.facts, self.first = recipe, facts, first
        self.device = device or torch.device("cpu")
        self.path = recipe.run_dir
        self.checkpoints, self.log = self.path / CHECKPOINTS, self.path / LOG
        self._stack = ExitStack()

    def __enter__(self) -> RunFolder:
        """Lock the folder, if it exists already."""
        self._lock()
        return self

    def __exit__(self, *error: object) -> None:
        """Give the lock back."""
        self._stack.close()

    def _lock(self) -> None:
        self._locked = self.first and self.path.is_dir()
        if self._locked:
            self._stack.enter_context(lock_run_folder(self.path))

    def begin(
        self,
        steps: int,
        *,
        resume: bool = False,
        overwrite: bool = False,
        resume_from: str | Path | None = None,
    ) -> Path | None:
        """Make the folder this run's, and say which checkpoint to begin from.

        The first rank checks every file; the others, which come after it, take the same one.

        Args:
            steps: optimiser steps of the run, for a branch those of its source included.
            resume: go on from the newest checkpoint.
            overwrite: replace a run that is there.
            resume_from: go on from this checkpoint of the run instead; newer ones are set aside.

        Returns:
            A checkpoint of this run, or the one that it branches off; None to begin at step 0.

        Raises:
            MorError: the run is there already, or there is nothing to resume, or another recipe
                made it, or the checkpoint is damaged or does not fit, or ``overwrite`` would remove
                files that no run has written.
        """
        resumes = resume or resume_from is not None
        source = self.recipe.train.branch_from
        source = source and source.expanduser()
        own = checkpoints.list_checkpoints(self.checkpoints) if resumes else []
        if not self.first:
            return own[-1] if own else source
        if source is not None and not own:
            source = check_source(self.recipe, steps, self.facts)
        checkpoint = self._select(resume_from) if resumes else None
        if not resumes:
            self._clear(overwrite)
        self._claim()
        if checkpoint is not None:
            check_facts(checkpoint, self.facts)
            print(f"{self.recipe.name}: goes on from {checkpoint.name}", file=sys.stderr)
            return checkpoint
        if resumes:
            print(f"{self.recipe.name}: no checkpoint yet, begins anew", file=sys.stderr)
        self.log.unlink(missing_ok=True)
        if source is not None and (source.parent.parent / LOG).is_file():
            shutil.copyfile(source.parent.parent / LOG, self.log)
        return source

    def _select(self, resume_from: str | Path | None) -> Path | None:
        """The checkpoint to go on from, after a look at who began the run."""
        self._check_same()
        checkpoints.recover(self.checkpoints)
        if resume_from is not None:
            return checkpoints.select_checkpoint(self.checkpoints, resume_from)
        return checkpoints.newest(self.checkpoints)

    def _claim(self) -> None:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            if not self._locked:
                self._lock()
            write_whole(self.path / RECIPE, dump_recipe(self.recipe))
            self.checkpoints.mkdir(exist_ok=True)
        except OSError as error:
            raise MorError(f"{self.path} cannot be written: {error.strerror or error}") from None

    def _clear(self, overwrite: bool) -> None:
        """Remove the run that is there, where that is wanted and nothing else is in its folder."""
        if not self.path.exists():
            return
        names = [entry.name for entry in self.path.iterdir()] if self.path.is_dir() else [""]
        if names and not overwrite:
            raise MorError(
                f"{self.path} already holds a run; use --resume, --overwrite or another name"
            )
        foreign = [name for name in sorted(names) if name.removesuffix(".partial") not in _OURS]
        if foreign:
            raise MorError(
                f"{self.path} holds {foreign[0] or 'a file, not a folder'}, which no run has "
                "written; overwrite removes whole run folders only: choose another name or output"
            )
        (self.path / RECIPE).unlink(missing_ok=True)  # first: half of a run is no run
        for entry in self.path.iterdir():  # not the folder itself: this process holds its lock
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            else:
                entry.unlink()

    def _check_same(self) -> None:
        """Refuse to go on with another recipe than the one that began.

        Raises:
            MorError: there is no run, it is finished, or fields differ that change the weights.
        """
        if (self.path / SUMMARY).is_file():
            raise MorError(f"{self.path} holds a finished run; nothing is left to resume")
        file = self.path / RECIPE
        if not file.is_file():
            if self.path.is_dir() and all(p.name.endswith(".partial") for p in self.path.iterdir()):
                return  # killed while it began
            raise MorError(f"{self.path} holds no run to resume; start without --resume")
        began = read_recipe(file)
        changed = find_differences(began, self.recipe)
        if self._same_batch(began):
            split = {f"train.{name}" for name in fields_that_decide(TrainSection, "batch split")}
            changed = {name: pair for name, pair in changed.items() if name not in split}
        if changed:
            hint = "resume with the same"
            if set(changed) == {"train.budget"}:
                hint = "resume with the same, or branch off with --branch-from and another name"
            said = describe_changes(changed)
            raise MorError(f"{self.path} was begun with another recipe: {said}; {hint}")

    def _same_batch(self, began: Recipe) -> bool:
        """Whether a step still sees as many sequences, only split another way."""
        saved = checkpoints.list_checkpoints(self.checkpoints)
        try:
            manifest = checkpoints.manifest(saved[-1]) if saved else {}
        except MorError:
            manifest = {}  # damaged: said later, by name
        before = manifest.get("sequences_per_step")
        if before is not None:
            return bool(before == self.facts["sequences_per_step"])
        return began.sequences_per_step() == self.recipe.sequences_per_step()

    def save(self, step: int, write: Callable[[Path], None]) -> None:
        """Write, check and publish ``checkpoint-N``; remove the oldest. All ranks call.

        Args:
            step: N, optimiser steps done.
            write: called on every rank with the folder to write this rank's part into.

        Raises:
            MorError: it could not be written; what was there before is as it was.
        """
        section = self.recipe.train

        def publish() -> None:
            checkpoints.publish(self.checkpoints, step, self.facts)
            checkpoints.rotate(self.checkpoints, section.save_total_limit, section.saves_at)

        save_checkpoint(
            self.checkpoints, step, write, publish, first=self.first, device=self.device
        )

    def publish_model(self, write: Callable[[Path], None]) -> None:
        """Write ``model/`` whole or not at all. All ranks call: they may hold shards.

        Args:
            write: called on every rank with the folder to write into.
        """
        if not self.first:
            write(self.path / MODEL)
            return
        with replace_folder(self.path / MODEL, overwrite=True, contended=False) as fresh:
            write(fresh)

    def publish_summary(self, record: dict[str, Any]) -> None:
        """Write ``summary.json``: the run is finished."""
        if self.first:
            write_whole(self.path / SUMMARY, json.dumps(record, indent=2) + "\n")
