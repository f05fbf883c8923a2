"""The Trainer's own checkpoint, written so that a kill at any moment leaves the last one whole."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import Trainer

from mor.errors import MorError
from mor.ops.ranks import any_rank
from mor.train.state import checkpoints

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
# How safetensors (Rust) and torch.save (C++) report a write that the system refused.
_UNWRITTEN = (
    "No space left",
    "Disk quota exceeded",
    "File too large",
    "file write failed",
    "unexpected pos",
    "iostream error",
)


def last_good(folder: Path) -> str:
    """Where training can go on from, as the end of a message."""
    whole = checkpoints.found(folder)
    if not whole:
        return "no checkpoint was saved yet (train.save_steps saves some)"
    return f"{whole[-1].name} is kept: go on from it with --resume"


def disk_full(error: BaseException) -> bool:
    """Whether a write failed for want of room; torch and safetensors do not say so by errno."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in _FULL
    return any(words in str(error) for words in _UNWRITTEN)


class AtomicSaves(Trainer):
    """A Trainer whose checkpoints are whole or absent (:mod:`mor.train.state.checkpoints`).

    The content is the Trainer's: weights, optimiser, schedule, random states, its own state.

    Attributes:
        checkpoint_facts: what is kept in the manifest beside the files.
        keeps: which steps' checkpoints are never rotated away.
    """

    checkpoint_facts: dict[str, Any]
    keeps: Callable[[int], bool]
    _staging: Path | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.checkpoint_facts = {}
        self.keeps = lambda step: False

    def _get_output_dir(self, trial: Any = None) -> str:
        return str(self._staging or super()._get_output_dir(trial))

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write beside, check that every rank wrote, publish, then rotate.

        Raises:
            MorError: it could not be written; what was there before is as it was.
        """
        folder, step = Path(self._get_output_dir(trial)), self.state.global_step
        first = self.args.should_save

        def publish() -> None:
            best = self.state.best_global_step
            if best:
                # The Trainer looked for it under the temporary name.
                self.state.best_model_checkpoint = str(folder / f"checkpoint-{best}")
                state = folder / checkpoints.STAGING / f"checkpoint-{step}" / "trainer_state.json"
                self.state.save_to_json(str(state))
            checkpoints.publish(folder, step, self.checkpoint_facts)
            keeps = self.keeps
            limit = self.args.save_total_limit
            checkpoints.rotate(folder, limit, lambda n: keeps(n) or n == best)

        try:
            if first:
                self._each(lambda: checkpoints.begin(folder), folder)
            else:
                self._each(lambda: None, folder)
            self._staging = folder / checkpoints.STAGING
            self._each(lambda: super(AtomicSaves, self)._save_checkpoint(model, trial), folder)
            self._each(publish if first else lambda: None, folder)
        finally:
            self._staging = None
            if first:
                shutil.rmtree(folder / checkpoints.STAGING, ignore_errors=True)

    def _each(self, do: Callable[[], Any], folder: Path) -> None:
        """Do it on this rank; go on when every rank has, or stop on all of them."""
        failure: Exception | None = None
        try:
            do()
        except torch.OutOfMemoryError:
            raise
        except (OSError, RuntimeError, SafetensorError) as error:
            failure = error
        if not any_rank(failure is not None, self.args.device):
            return
        name = f"checkpoint-{self.state.global_step}"
        if failure is None:
            raise MorError(f"{name} was not written: another rank failed; {last_good(folder)}")
        if isinstance(failure, RuntimeError) and not disk_full(failure):
            raise failure
        shutil.rmtree(folder / checkpoints.STAGING, ignore_errors=True)
        raise MorError(
            f"{name} could not be written to {folder}: {why(failure, folder)}; {last_good(folder)}"
        ) from failure


def why(error: BaseException, folder: Path) -> str:
    """The reason why a write failed, and what helps."""
    if disk_full(error):
        return f"{_room(folder)}; make room, or lower train.save_total_limit"
    if isinstance(error, OSError):
        place = f"{error.filename}: " if error.filename else ""
        return place + (error.strerror or str(error))
    return " ".join(str(error).split())[:200]


def _room(folder: Path) -> str:
    while not folder.is_dir() and folder != folder.parent:
        folder = folder.parent
    try:
        free = shutil.disk_usage(folder).free
    except OSError:
        return "the disk is full"
    # A quota or a limit on file sizes is met before the disk is full.
    return (
        f"the disk is full or a quota is met ({free / 2**20:,.0f} MiB of {os.fspath(folder)} free)"
    )
