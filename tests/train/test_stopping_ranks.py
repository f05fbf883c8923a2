"""Several ranks: one that is told to stop, or cannot save, is enough, and all stop at one step."""

from __future__ import annotations

import errno
import multiprocessing
import os
import signal
import socket
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from mor.errors import MorError
from mor.train import Interrupted, Recipe, train
from mor.train.loop import Loop
from mor.train.state import checkpoints
from tests.tiny import tiny_recipe

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform == "win32", reason="forks"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="forks, two ranks on the CPU"),
]


def rank(number: int, port: int, recipe: Recipe, what: str, said: Any) -> None:
    """One of two ranks, in a forked child."""
    meet = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    os.environ.update(meet | {"RANK": str(number), "LOCAL_RANK": str(number)})
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # as torchrun does
    before = Loop.learn_micro_batch

    def acting(self: Loop, *args: Any, **kwargs: Any) -> Any:
        if what.startswith("SIG") and number == 1 and self.step == 3:
            os.kill(os.getpid(), getattr(signal, what))
            os.kill(os.getpid(), signal.SIGTERM)  # the launcher's own, a moment later
        return before(self, *args, **kwargs)

    def full(*args: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    Loop.learn_micro_batch = acting  # type: ignore[method-assign]
    if what == "full" and number == 0:
        checkpoints.publish = full
    try:
        train(recipe, resume=what == "resume")
        said.put((number, "done"))
    except Interrupted as error:
        said.put((number, str(error)))
    except MorError as error:
        said.put((number, f"error: {error}"))


def run_two(recipe: Recipe, what: str) -> dict[int, str]:
    with socket.socket() as found:
        found.bind(("localhost", 0))
        port = found.getsockname()[1]
    context = multiprocessing.get_context("fork")
    said = context.SimpleQueue()
    ranks = [context.Process(target=rank, args=(n, port, recipe, what, said)) for n in (0, 1)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(60)
        if process.exitcode is None:
            process.kill()
            pytest.fail("the ranks wait for each other")
    return dict(said.get() for _ in ranks if not said.empty())


def test_one_is_told_and_all_stop(data: Path, tmp_path: Path) -> None:
    """SLURM's SIGUSR1 at rank 1: both end at the same step, and both go on from there."""
    fields = {"gradient_accumulation_steps": 1, "eval_steps": 3}
    whole = tiny_recipe(data, tmp_path / "whole", "random", **fields)
    assert run_two(whole, "nothing") == {0: "done", 1: "done"}
    recipe = tiny_recipe(data, tmp_path / "cut", "random", **fields)
    said = run_two(recipe, "SIGUSR1")
    assert set(said) == {0, 1}
    assert all("stopped at step 4 of 8" in text for text in said.values()), said
    [checkpoint] = checkpoints.list_checkpoints(recipe.run_dir / "checkpoints")
    assert checkpoints.damage(checkpoint) is None
    files = checkpoints.manifest(checkpoint)["files"]
    assert {"rng_state_0.pth", "rng_state_1.pth"} <= set(files)  # of both ranks, before it counts
    assert run_two(recipe, "resume") == {0: "done", 1: "done"}
    weights = [r.run_dir / "model" / "model.safetensors" for r in (whole, recipe)]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def test_one_cannot_save_and_all_stop(data: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe(data, tmp_path, gradient_accumulation_steps=1, save_steps=4)
    said = run_two(recipe, "full")
    assert "the disk is full" in said[0]
    assert "checkpoint-4 was not written: another rank failed" in said[1]
    assert checkpoints.list_checkpoints(recipe.run_dir / "checkpoints") == []
