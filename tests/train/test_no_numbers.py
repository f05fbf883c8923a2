"""Losses, gradients and weights that are no numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mor.errors import MorError
from mor.train import Recipe, train
from mor.train.loop import Loop
from mor.train.objective import LossParts, NextToken
from mor.train.state import checkpoints
from mor.train.step.optimiser import Optimiser
from tests.tiny import tiny_recipe
from tests.train.stopping import fields, kept, weights

pytestmark = pytest.mark.slow


# Numbers that are none -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "micro_batch", "model"),
    [
        (float("nan"), 0, {}),
        (float("inf"), 1, {}),
        (float("nan"), 1, {"router_objective": "aux_router"}),
    ],
)
def test_a_loss_that_is_no_number_stops_that_step(
    value: float,
    micro_batch: int,
    model: dict[str, Any],
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In the step where it happens, before the optimiser moves anything, whatever is logged."""
    recipe = tiny_recipe(data, tmp_path, model=model, **fields(logging_steps=100))
    weights_before: list[torch.Tensor] = []
    models: list[torch.nn.Module] = []
    before = NextToken.__call__
    calls = 0

    def poisoned(self: NextToken, model: torch.nn.Module, *args: Any, **kwargs: Any) -> LossParts:
        nonlocal calls
        calls += 1
        parts = before(self, model, *args, **kwargs)
        if calls == 2 * 4 + 1:  # step 5 begins
            weights_before.extend(p.detach().clone() for p in model.parameters())
            models.append(model)
        if calls == 2 * 4 + 1 + micro_batch:
            parts.total = parts.total * value
        return parts

    monkeypatch.setattr(NextToken, "__call__", poisoned)
    with pytest.raises(MorError, match=r"is (nan|inf) at step 5; lower train\.learning_rate=0\.01"):
        train(recipe)
    assert kept(recipe) == [2, 4]
    now = models[0].parameters()
    assert all(torch.equal(a, b) for a, b in zip(weights_before, now, strict=True))
    assert not (recipe.run_dir / "model").exists()


def test_a_loss_may_be_infinite_alone(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    """A penalty that overflows has finite gradients; it is no loss to go on with."""
    before = NextToken.__call__
    calls = 0

    def poisoned(self: NextToken, *args: Any, **kwargs: Any) -> LossParts:
        nonlocal calls
        calls += 1
        parts = before(self, *args, **kwargs)
        if (calls - 1) // 2 == 2:  # two micro-batches a step
            parts.total = parts.total + float("inf")
        return parts

    monkeypatch.setattr(NextToken, "__call__", poisoned)
    with pytest.raises(MorError, match="the loss is inf at step 3"):
        train(recipe)


def test_an_auxiliary_routers_gradient_counts(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is clipped by itself, so the network's norm does not show it."""
    recipe = tiny_recipe(data, tmp_path, model={"router_objective": "aux_router"}, **fields())
    before = Optimiser.clip
    calls = 0

    def poisoned(self: Optimiser) -> Any:
        nonlocal calls
        calls += 1
        if calls == 3:
            self.auxiliary[0].grad.fill_(float("nan"))  # type: ignore[union-attr]
        return before(self)

    monkeypatch.setattr(Optimiser, "clip", poisoned)
    with pytest.raises(MorError, match="the auxiliary router's gradient norm is nan at step 3"):
        train(recipe)
    assert kept(recipe) == [2]


@pytest.mark.parametrize("logging_steps", [1, 100])
def test_a_rate_that_breaks_all(logging_steps: int, data: Path, tmp_path: Path) -> None:
    """Step 1 learns nothing (warm-up from 0), step 2 breaks all; what was whole is kept."""
    recipe = tiny_recipe(
        data,
        tmp_path,
        learning_rate=1e25,
        budget={"steps": 20},
        save_steps=1,
        logging_steps=logging_steps,
        weight_decay=0.0,
    )
    with pytest.raises(MorError, match=r"at step [23]; lower train.learning_rate=1e\+25") as caught:
        train(recipe)
    assert "\n" not in str(caught.value)
    saved = checkpoints.list_checkpoints(recipe.run_dir / "checkpoints")
    assert saved
    for checkpoint in saved:
        tensors = load_file(checkpoint / "model.safetensors")
        assert all(bool(tensor.isfinite().all()) for tensor in tensors.values())
    assert not (recipe.run_dir / "model").exists()


def test_weights_that_are_no_numbers_are_not_saved(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever broke them between the gradient and the save."""
    before = Loop.save

    def poisoned(self: Loop, *args: Any, **kwargs: Any) -> None:
        if self.step == 4:
            with torch.no_grad():
                next(iter(self.parallel.plain.parameters()))[0] = float("nan")
        before(self, *args, **kwargs)

    monkeypatch.setattr(Loop, "save", poisoned)
    with pytest.raises(MorError, match="a weight is not a finite number at step 4"):
        train(recipe)
    assert kept(recipe) == [2]


def test_evaluation_draws_nothing_from_training(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The random router's draws, and so the weights, do not hang on how often one evaluates."""
    runs_ = [train(tiny_recipe(data, tmp_path / str(n), "random", eval_steps=n)) for n in (1, None)]
    assert weights(runs_[0]) == weights(runs_[1])
