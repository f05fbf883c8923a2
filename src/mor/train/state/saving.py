"""Writing a checkpoint with all ranks: it counts when every rank has written, or not at all."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError

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


def save_checkpoint(
    folder: Path,
    step: int,
    write: Callable[[Path], None],
    publish: Callable[[], None],
    *,
    first: bool,
    device: torch.device,
) -> None:
    """Write beside, check that every rank wrote, then publish. Every rank calls.

    Args:
        folder: the checkpoints of one run.
        step: optimiser steps done.
        write: writes this rank's part into a folder.
        publish: what the first rank does when all have written.
        first: whether this is the first rank.
        device: of this rank.

    Raises:
        MorError: it could not be written; what was there before is as it was.
    """
    fresh = folder / checkpoints.STAGING / f"checkpoint-{step}"

    def nothing() -> None:
        pass

    def write_part() -> None:
        fresh.mkdir(parents=True, exist_ok=True)
        write(fresh)

    try:
        for task in (
            (lambda: checkpoints.begin(folder)) if first else nothing,
            write_part,
            publish if first else nothing,
        ):
            _do_on_all(task, folder, step, device)
    finally:
        if first:
            shutil.rmtree(folder / checkpoints.STAGING, ignore_errors=True)


def _do_on_all(task: Callable[[], object], folder: Path, step: int, device: torch.device) -> None:
    """Do it on this rank; go on when every rank has, or stop on all of them."""
    failure: Exception | None = None
    try:
        task()
    except torch.OutOfMemoryError:
        raise
    except (OSError, RuntimeError, SafetensorError) as error:
        failure = error
    if not any_rank(failure is not None, device):
        return
    name = f"checkpoint-{step}"
    if failure is None:
        raise MorError(f"{name} was not written: another rank failed; {describe_last_good(folder)}")
    if isinstance(failure, RuntimeError) and not is_disk_full(failure):
        raise failure
    shutil.rmtree(folder / checkpoints.STAGING, ignore_errors=True)  # give its room back
    reason = describe_write_failure(failure, folder)
    raise MorError(
        f"{name} could not be written to {folder}: {reason}; {describe_last_good(folder)}"
    ) from failure


def describe_last_good(folder: Path) -> str:
    """Where training can go on from, as the end of a message."""
    whole = checkpoints.list_checkpoints(folder)
    if not whole:
        return "no checkpoint was saved yet (train.save_steps saves some)"
    return f"{whole[-1].name} is kept: go on from it with --resume"


def is_disk_full(error: BaseException) -> bool:
    """Whether a write failed for want of room; torch and safetensors do not say so by errno."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in _FULL
    return any(words in str(error) for words in _UNWRITTEN)


def describe_write_failure(error: BaseException, folder: Path) -> str:
    """The reason why a write failed, and what helps."""
    if is_disk_full(error):
        return f"{_describe_room(folder)}; make room, or lower train.save_total_limit"
    if isinstance(error, OSError):
        place = f"{error.filename}: " if error.filename else ""
        return place + (error.strerror or str(error))
    return " ".join(str(error).split())[:200]


def _describe_room(folder: Path) -> str:
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
