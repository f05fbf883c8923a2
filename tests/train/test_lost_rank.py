"""One of four ranks is killed; the run goes on with three, and ends as if nothing had happened."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mor.train import Recipe, train
from mor.train.loop import Loop
from mor.train.state import checkpoints
from tests.tiny import tiny_recipe

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform == "win32", reason="forks"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="forks, ranks on the CPU"),
]

DIES_AT = 5


def rank(number: int, world: int, port: int, recipe: Recipe, dies: bool, resume: bool) -> None:
    """One rank, in a forked child, as torchrun would start it."""
    meet = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "WORLD_SIZE": str(world)}
    os.environ.update(meet | {"RANK": str(number), "LOCAL_RANK": str(number)})
    os.environ["OMP_NUM_THREADS"] = "1"
    os.close(2)
    os.open(os.devnull, os.O_WRONLY)
    before = Loop.learn_micro_batch

    def acting(self: Loop, *args: object, **kwargs: object) -> object:
        if dies and number == 2 and self.step == DIES_AT:
            os.kill(os.getpid(), signal.SIGKILL)
        return before(self, *args, **kwargs)  # type: ignore[arg-type]

    Loop.learn_micro_batch = acting  # type: ignore[method-assign,assignment]
    train(recipe, resume=resume)


def run(recipe: Recipe, world: int, *, dies: bool = False, resume: bool = False) -> list[int]:
    """Exit codes of the ranks. Where one dies the others are ended, as torchrun does."""
    with socket.socket() as found:
        found.bind(("localhost", 0))
        port = found.getsockname()[1]
    context = multiprocessing.get_context("fork")
    args = [(number, world, port, recipe, dies, resume) for number in range(world)]
    ranks = [context.Process(target=rank, args=one) for one in args]
    for process in ranks:
        process.start()
    end = time.monotonic() + 120
    while any(process.exitcode is None for process in ranks) and time.monotonic() < end:
        if any(process.exitcode for process in ranks):
            for process in ranks:
                process.kill()
        time.sleep(0.02)
    for process in ranks:
        process.kill()
        process.join()
    return [process.exitcode or 0 for process in ranks]


def test_a_rank_is_killed_and_the_run_goes_on_with_fewer(data: Path, tmp_path: Path) -> None:
    fields = {
        "parallel": "fsdp", "batch_size": 1, "global_batch_size": 12, "save_steps": 2,
        "gradient_accumulation_steps": 1, "adam_epsilon": 1e-3,
    }  # fmt: skip
    whole = tiny_recipe(
        data, tmp_path / "whole", "fixed", **fields | {"parallel": "ddp", "batch_size": 12}
    )
    train(whole)
    recipe = tiny_recipe(data, tmp_path / "cut", "fixed", **fields)
    codes = run(recipe, 4, dies=True)
    assert codes[2] == -signal.SIGKILL
    assert all(codes)  # nobody says it has finished
    newest = checkpoints.list_checkpoints(recipe.run_dir / "checkpoints")[-1]
    assert newest.name == f"checkpoint-{DIES_AT - 1}"
    assert checkpoints.damage(newest) is None
    assert run(recipe, 3, resume=True) == [0, 0, 0]
    one, other = (load_file(r.run_dir / "model" / "model.safetensors") for r in (whole, recipe))
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(other[name], one[name], rtol=1e-4, atol=2e-6, msg=name)
