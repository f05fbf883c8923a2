"""The whole fan of branches in one command."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from mor.errors import MorError
from mor.train import Interrupted, Recipe, train
from mor.train.loop import Loop
from mor.train.recipe.sections import RecipeError
from mor.train.state import checkpoints
from tests.tiny import tiny_recipe
from tests.train.test_branches import named, weights

pytestmark = pytest.mark.slow


# The whole fan in one command ------------------------------------------------------------------


def fan_of(data: Path, output: Path, branches: list[int], **fields: Any) -> Recipe:
    budgets = [{"steps": number} for number in branches]
    return tiny_recipe(data, output, branches=budgets, **{"budget": {"steps": 16}} | fields)


def test_the_fan(data: Path, tmp_path: Path) -> None:
    """Warm-up is that of the smallest budget; each is the run that it would be by itself."""
    recipe = fan_of(data, tmp_path, [12, 8], save_steps=2, save_total_limit=1)
    train(recipe)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"tiny", "tiny-8", "tiny-12"}
    for number in (16, 12, 8):
        fields = {"budget": {"steps": number}, "warmup_steps": 2}  # a quarter of 8
        direct = named(tiny_recipe(data, tmp_path, **fields), f"direct-{number}")
        run = tmp_path / ("tiny" if number == 16 else f"tiny-{number}")
        assert weights(run) == weights(train(direct)), number
    kept = [
        checkpoints.step_of(p)
        for p in checkpoints.list_checkpoints(tmp_path / "tiny" / "checkpoints")
    ]
    assert kept == [6, 9, 16]  # where the cool-downs branch off, whatever the limit
    found = json.loads((tmp_path / "tiny-8" / "summary.json").read_text())
    assert found["branched_at_step"] == 6


@pytest.mark.parametrize("step", [7, 14])
def test_the_fan_resumes(
    step: int, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped within the long run, or within a branch (whose steps are 12 at most)."""
    recipe = fan_of(data, tmp_path / "cut", [15, 8])
    train(fan_of(data, tmp_path / "whole", [15, 8]))
    before, seen = Loop.learn_micro_batch, [0]

    def stopping(self: Loop, *args: Any, **kwargs: Any) -> Any:
        seen[0] += self.step == step
        if seen[0] == (1 if step == 7 else 3):  # two micro-batches of the long run come first
            seen[0] = 99
            raise KeyError
        return before(self, *args, **kwargs)

    monkeypatch.setattr(Loop, "learn_micro_batch", stopping)
    with pytest.raises(KeyError):
        train(recipe)
    monkeypatch.setattr(Loop, "learn_micro_batch", before)
    train(recipe, resume=True)
    for name in ("tiny", "tiny-8", "tiny-15"):
        assert weights(tmp_path / "cut" / name) == weights(tmp_path / "whole" / name)
    with pytest.raises(MorError, match="finished run; nothing is left to resume"):
        train(recipe, resume=True)


def test_a_fan_is_not_overwritten_unasked(data: Path, tmp_path: Path) -> None:
    """Said before the long run is trained, not after."""
    (tmp_path / "tiny-8").mkdir()
    with pytest.raises(MorError, match="tiny-8 already holds a run"):
        train(fan_of(data, tmp_path, [8]))
    assert not (tmp_path / "tiny").exists()


@pytest.mark.parametrize(
    ("branches", "fields", "words"),
    [
        ([16], {}, "a budget of 16 steps; each must .* be shorter than train.budget, 16 steps"),
        ([8, 8], {}, "a budget of 8 steps; each must differ"),
        ([8, 1], {"warmup_steps": 3}, "1 steps leave no stable phase"),
        ([8], {"branch_from": "x"}, "branch_from='x' and branches exclude each other"),
    ],
)
def test_a_fan_that_cannot_be(
    branches: list[int], fields: dict[str, Any], words: str, data: Path, tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match=words):
        train(fan_of(data, tmp_path, branches, **fields))
    assert not list(tmp_path.iterdir())


def test_interrupted_within_the_fan(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = Loop.learn_micro_batch

    def told(self: Loop, *args: Any, **kwargs: Any) -> Any:
        if self.step == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return before(self, *args, **kwargs)

    monkeypatch.setattr(Loop, "learn_micro_batch", told)
    with pytest.raises(Interrupted, match="stopped at step 5 of 16"):
        train(fan_of(data, tmp_path, [8]))
    assert not (tmp_path / "tiny-8").exists()
