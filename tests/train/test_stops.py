"""A full disk, no memory, a number that is none: a clear stop, the last good state kept."""

from __future__ import annotations

import errno
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from mor.errors import MorError
from mor.train import Recipe, guards, train
from mor.train.loop import Loop
from mor.train.state import checkpoints
from tests.tiny import tiny_recipe
from tests.train.stopping import kept, once_at, weights

pytestmark = pytest.mark.slow


# Disk ------------------------------------------------------------------------------------------


@contextmanager
def files_at_most(size: int) -> Iterator[None]:
    """The system itself refuses to write more than ``size`` bytes into one file."""
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.skipif(sys.platform == "win32", reason="limits of POSIX")
@pytest.mark.parametrize("size", [300, 20_000, 60_000])
def test_a_disk_that_is_full(
    size: int, recipe: Recipe, whole: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Real failing writes: of config.json, of the weights (Rust), of the optimiser (C++)."""
    before = Loop.save

    def cramped(self: Loop, *args: Any, **kwargs: Any) -> None:
        if self.step == 6:
            with files_at_most(size):
                before(self, *args, **kwargs)
        before(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Loop, "save", cramped)
        with pytest.raises(MorError, match=r"checkpoint-6 could not be written") as caught:
            train(recipe)
    said = str(caught.value)
    assert "the disk is full or a quota is met" in said
    assert said.endswith("checkpoint-4 is kept: go on from it with --resume")
    assert kept(recipe) == [2, 4]
    assert not (recipe.run_dir / "checkpoints" / "saving").exists()  # its room is given back
    train(recipe, resume=True)
    assert weights(recipe.run_dir) == whole


def full(*args: Any, **kwargs: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device", "some/file")


@pytest.mark.parametrize(
    ("where", "name"),
    [(checkpoints, "flush_tree"), (checkpoints, "digest"), (checkpoints, "flush")],
)
def test_a_disk_that_fills_while_a_save_is_sealed(
    where: Any, name: str, recipe: Recipe, whole: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        once_at(
            6,
            Loop,
            "save",
            lambda: patch.setattr(where, name, full),
            patch,
        )
        with pytest.raises(MorError, match=r"checkpoint-6 could not be written to .*disk is full"):
            train(recipe)
    assert kept(recipe) == [2, 4]
    train(recipe, resume=True)
    assert weights(recipe.run_dir) == whole


@pytest.mark.parametrize(
    ("name", "last"),
    [("mor.train.logs.log.append_jsonl", 4), ("mor.train.state.run_folder.write_whole", 8)],
)
def test_a_disk_that_fills_elsewhere(
    name: str, last: int, recipe: Recipe, whole: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The log at step 5, the summary at the end."""
    with monkeypatch.context() as patch:
        once_at(4, Loop, "learn_micro_batch", lambda: patch.setattr(name, full), patch)
        with pytest.raises(
            MorError, match=rf"stopped after step \d: the disk is full.*checkpoint-{last} is kept"
        ):
            train(recipe)
    train(recipe, resume=True)
    assert weights(recipe.run_dir) == whole


def test_another_error_of_a_file(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*args: Any) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", "some/file")

    monkeypatch.setattr(checkpoints, "publish", refused)
    with pytest.raises(MorError, match=r"checkpoint-2 .*some/file: Permission denied; no checkp"):
        train(recipe)


def test_a_mistake_of_ours_is_no_full_disk(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(*args: Any) -> None:
        raise RuntimeError("shapes differ")

    monkeypatch.setattr(checkpoints, "publish", wrong)
    with pytest.raises(RuntimeError, match="shapes differ"):
        train(recipe)


# Memory ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate"
                     " memory: you tried to allocate 4 bytes. Error code 12"),
    ],
)  # fmt: skip
def test_out_of_memory(
    error: Exception, recipe: Recipe, whole: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> None:
        raise error

    with monkeypatch.context() as patch:
        once_at(5, Loop, "learn_micro_batch", fail, patch)
        with pytest.raises(MorError, match="out of memory after step 5") as caught:
            train(recipe)
    said = str(caught.value)
    assert "(micro-batches of 2 sequences of 16 tokens)" in said
    assert "set train.gradient_checkpointing=true or set train.batch_size=1 and" in said
    assert "train.gradient_accumulation_steps=4 (as many sequences per step)" in said
    assert said.endswith("checkpoint-4 is kept: go on from it with --resume")
    train(recipe, resume=True)
    assert weights(recipe.run_dir) == whole


def test_memory_that_is_really_not_there(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    once_at(1, Loop, "learn_micro_batch", lambda: torch.empty(2**60), monkeypatch)
    with pytest.raises(MorError, match=r"out of memory after step 1.*no checkpoint was saved yet"):
        train(recipe)


def test_what_would_be_lighter(data: Path, tmp_path: Path) -> None:
    last = tiny_recipe(data, tmp_path, batch_size=1, gradient_checkpointing=True)
    assert (
        guards.suggest_less_memory(last) == "shorten data.seq_len or shrink the model, in a new run"
    )
    odd = tiny_recipe(data, tmp_path, batch_size=11, gradient_checkpointing=True)
    assert (
        "train.batch_size=1 and train.gradient_accumulation_steps=22 "
        in guards.suggest_less_memory(odd)
    )


def test_any_other_error_stays_what_it_is(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong() -> None:
        raise RuntimeError("shapes differ")

    once_at(3, Loop, "learn_micro_batch", wrong, monkeypatch)
    with pytest.raises(RuntimeError, match="shapes differ"):
        train(recipe)
