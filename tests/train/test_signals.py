"""Asked to stop: a checkpoint, and the same command goes on."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mor.train import Interrupted, train
from mor.train.loop import Loop
from tests.tiny import prepare_tiny, tiny_recipe
from tests.train.test_resume import weights

# Asked to stop ---------------------------------------------------------------------------------


@pytest.fixture
def at_step(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, Callable[[], None]], None]:
    """Do something once, in the middle of a step."""
    before = Loop.learn_micro_batch

    def plan(step: int, action: Callable[[], None]) -> None:
        todo = [action]

        def acting(self: Loop, *args: Any, **kwargs: Any) -> Any:
            if self.step == step and todo:
                todo.pop()()
            return before(self, *args, **kwargs)

        monkeypatch.setattr(Loop, "learn_micro_batch", acting)

    return plan


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_stops_with_a_checkpoint(
    number: signal.Signals,
    at_step: Any,
    data: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    recipe = tiny_recipe(data, tmp_path, "threshold")
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    handlers = [signal.getsignal(known) for known in numbers]
    at_step(3, lambda: os.kill(os.getpid(), number))
    with pytest.raises(Interrupted, match=r"stopped at step 4 of 8.*--resume"):
        train(recipe)
    assert [signal.getsignal(known) for known in numbers] == handlers
    assert "stopping after this step" in capfd.readouterr().err
    folder = recipe.run_dir
    assert [p.name for p in (folder / "checkpoints").iterdir()] == ["checkpoint-4"]
    assert not (folder / "model").exists()


def test_what_a_signal_stopped_goes_on(at_step: Any, data: Path, tmp_path: Path) -> None:
    fields = {"gradient_accumulation_steps": 1, "batch_size": 4}
    recipe = tiny_recipe(data, tmp_path, "threshold", **fields)
    whole = train(tiny_recipe(data, tmp_path / "whole", "threshold", **fields))
    other = train(tiny_recipe(data, tmp_path / "other", "threshold"))
    at_step(3, lambda: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(Interrupted):
        train(recipe)
    train(recipe, resume=True)
    assert weights(recipe.run_dir) == weights(whole)
    assert weights(recipe.run_dir) != weights(other)


def test_a_second_signal_stops_at_once(at_step: Any, data: Path, tmp_path: Path) -> None:
    def twice() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    at_step(3, twice)
    recipe = tiny_recipe(data, tmp_path, save_steps=2)
    with pytest.raises(KeyboardInterrupt):
        train(recipe)
    assert [p.name for p in (recipe.run_dir / "checkpoints").iterdir()] == ["checkpoint-2"]
    train(recipe, resume=True)


def test_a_batch_system_may_say_it_twice(at_step: Any, data: Path, tmp_path: Path) -> None:
    """SLURM sends SIGUSR1, then SIGTERM when time is up: the checkpoint is still written."""

    def twice() -> None:
        os.kill(os.getpid(), signal.SIGUSR1)
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)

    at_step(3, twice)
    with pytest.raises(Interrupted, match="stopped at step 4 of 8"):
        train(tiny_recipe(data, tmp_path))


@pytest.mark.slow
def test_a_signal_to_the_whole_job(at_step: Any, tmp_path: Path) -> None:
    """Batch systems and terminals signal the data workers too: they must not take the run down."""

    def all_told() -> None:
        workers = [str(child.pid) for child in multiprocessing.active_children()]
        assert len(workers) == 2
        for name in ("INT", "USR1", "TERM"):  # from outside: from their parent they take it
            subprocess.run(["kill", f"-{name}", *workers, str(os.getpid())], check=True)
        time.sleep(0.3)

    data = prepare_tiny(tmp_path, documents=40, words=60)  # an epoch is longer than the run
    fields = {"num_workers": 2, "budget": {"steps": 12}}
    whole = train(tiny_recipe(data, tmp_path / "whole", "random", **fields))
    at_step(4, all_told)
    recipe = tiny_recipe(data, tmp_path, "random", **fields)
    with pytest.raises(Interrupted, match="stopped at step 5 of 12"):
        train(recipe)
    train(recipe, resume=True)
    assert weights(recipe.run_dir) == weights(whole)


def test_a_signal_in_the_last_step_changes_nothing(
    at_step: Any, data: Path, tmp_path: Path
) -> None:
    at_step(7, lambda: os.kill(os.getpid(), signal.SIGINT))
    assert (train(tiny_recipe(data, tmp_path)) / "model").is_dir()
