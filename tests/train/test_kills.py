"""``kill -9`` at any moment, ``--resume``, and the weights are those of a run never killed.

A run lives in a forked child: torch is imported already, so a life costs a fraction of a second.
Saving is slowed down in the child, so that kills fall into it as well; the parent waits for a
moment of some kind and then for a random while. The kills are real: SIGKILL, from another process.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mor.train import Interrupted, Recipe, train
from mor.train.loop import Loop
from mor.train.state import checkpoints
from tests.tiny import tiny_recipe

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform == "win32", reason="forks"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="forks, and bits are the CPU's"),
]

STEPS = 12
# Of every life but the last. Some get two checkpoints further, so an early one may see the end.
DEATHS = ["starting", "saving", "saving", "saving", "training"]
PAUSE_S = 0.01  # after each of a save's writes, in the child
WARM = {"router_capacity_warmup_steps": 7}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "threshold": ("threshold", WARM),
    "token_choice, loss-free": (
        "token_choice",
        {"router_balancing": "loss_free", "router_balance_warmup_steps": 2},
    ),
    "random": ("random", WARM),
    "expert_choice, auxiliary router": ("expert_choice", {"router_objective": "aux_router"}),
}


def slowed(do: Callable[..., Any]) -> Callable[..., Any]:
    def slow(*args: Any, **kwargs: Any) -> Any:
        time.sleep(PAUSE_S)
        result = do(*args, **kwargs)
        time.sleep(PAUSE_S)
        return result

    return slow


def live(recipe: Recipe, resume: bool) -> None:
    """One life of the run, in a child of its own."""
    os.close(2)
    os.open(os.devnull, os.O_WRONLY)
    torch.save = slowed(torch.save)
    for name in ("flush_tree", "flush", "_remove"):
        setattr(checkpoints, name, slowed(getattr(checkpoints, name)))
    Loop.learn_micro_batch = slowed(Loop.learn_micro_batch)  # type: ignore[method-assign]
    try:
        train(recipe, resume=resume)
    except Interrupted:
        os._exit(130)
    os._exit(0)


def born(recipe: Recipe) -> Any:
    resume = recipe.run_dir.exists()
    child = multiprocessing.get_context("fork").Process(target=live, args=(recipe, resume))
    child.start()
    return child


def wait_for(moment: Callable[[], bool], child: Any) -> None:
    while child.is_alive() and not moment():
        time.sleep(0.001)


def kill(child: Any, recipe: Recipe, how: str, draw: random.Random) -> bool:
    """SIGKILL at a random moment of the kind ``how``; whether the run was still alive."""
    folder = recipe.run_dir / "checkpoints"
    saving = folder / checkpoints.STAGING
    goal = newest(folder) + 2 * draw.randint(0, 1)
    if how == "starting":
        time.sleep(draw.uniform(0, 0.4))
    elif how == "saving":
        wait_for(lambda: newest(folder) >= goal, child)
        wait_for(lambda: not saving.is_dir(), child)
        wait_for(saving.is_dir, child)
        time.sleep(draw.uniform(0, 15 * PAUSE_S))
    elif how == "training":
        wait_for(lambda: newest(folder) > goal, child)
        time.sleep(draw.uniform(0, 8 * PAUSE_S))
    else:
        wait_for(lambda: newest(folder) == STEPS, child)
        time.sleep(draw.uniform(0, 8 * PAUSE_S))
    alive = child.is_alive()
    child.kill()  # multiprocessing's own: a child that ended by itself, and was reaped, is no error
    child.join()
    return alive and child.exitcode == -signal.SIGKILL


def newest(folder: Path) -> int:
    return max(map(checkpoints.step_of, checkpoints.list_checkpoints(folder)), default=0)


@pytest.mark.parametrize("kind", list(KINDS))
def test_killed_again_and_again(kind: str, data: Path, tmp_path: Path) -> None:
    router, model = KINDS[kind]
    fields = {
        "budget": {"steps": STEPS},
        "batch_size": 4,
        "save_steps": 2,
        "save_total_limit": 1,
        "eval_steps": 3,
    }
    whole = train(tiny_recipe(data, tmp_path / "whole", router, model, **fields))
    recipe = tiny_recipe(data, tmp_path / "killed", router, model, **fields)
    draw = random.Random(f"{kind}, {time.time_ns()}")  # other moments in every run
    draw.shuffle(deaths := list(DEATHS))
    within_saves, reached = 0, []
    folder = recipe.run_dir / "checkpoints"
    for how in [*deaths, "ending"]:
        killed = kill(born(recipe), recipe, how, draw)
        over = how == "ending" or newest(folder) == STEPS  # then it may end before it is killed
        assert killed or over, "the run came to its end too early, or failed by itself"
        within_saves += (folder / checkpoints.STAGING).is_dir()
        reached.append(newest(folder))
        for checkpoint in checkpoints.list_checkpoints(folder):
            assert checkpoints.damage(checkpoint) is None, (reached, checkpoint)
        assert reached == sorted(reached), "a checkpoint was lost"
    assert within_saves, "no kill fell into a save"
    if not (recipe.run_dir / "summary.json").exists():
        last = born(recipe)
        last.join(60)
        assert last.exitcode == 0
    assert not (folder / checkpoints.STAGING).exists()
    assert weights(recipe.run_dir) == weights(whole), reached
    assert steps_logged(recipe.run_dir) == list(range(1, STEPS + 1))
    print(deaths, within_saves, reached)


def weights(run: Path) -> bytes:
    return (run / "model" / "model.safetensors").read_bytes()


def steps_logged(run: Path) -> list[int]:
    entries = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [entry["step"] for entry in entries if "loss" in entry]
