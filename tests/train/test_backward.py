"""What is recorded and replayed learns what is learnt operator after operator."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from mor.errors import MorError
from mor.ops.replay import Recorded
from mor.train import Recipe
from mor.train.distributed import Parallel
from mor.train.objective import NextToken, count_targets
from mor.train.recipe.depth import RouteByLossSection
from mor.train.step.backward import Backward, ReplayedBackward, make_backward
from tests.strategies import make_model, random_ids, small_config
from tests.train.loops import loop_of
from tests.train.test_waits import as_on_a_gpu


def test_recorded_writes_where_it_wrote() -> None:
    number = torch.tensor([1.0, 2.0])
    twice = Recorded(lambda: (number * 2, number.sum()))
    first = twice.found[0]
    number += 1
    assert twice()[0] is first
    assert first.tolist() == [4.0, 6.0]
    assert float(twice.found[1]) == 5.0


@pytest.mark.parametrize(
    ("accumulation", "router", "fields"),
    [
        (1, "fixed", {"num_recursions": 1}),
        (3, "fixed", {}),
        (1, "expert_choice", {}),
        (3, "expert_choice", {"kv_sharing": "recursive", "router_objective": "aux_router"}),
        (1, "expert_choice", {"router_capacity_warmup_steps": 4}),
        (3, "expert_choice", {"router_capacity_warmup_steps": 4}),
        (1, "threshold", {"router_z_loss_coef": 0.01}),
        (3, "threshold", {"kv_sharing": "recursive_update"}),
        (1, "threshold", {"kv_sharing": "propagate"}),
    ],
)
def test_a_run_is_the_same(
    data: Path,
    tmp_path: Path,
    accumulation: int,
    router: str,
    fields: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Logged steps, which are not replayed, lie between those that are."""
    as_on_a_gpu(monkeypatch)
    weights, entries = [], []
    for replayed in (False, True):
        model = make_model(small_config(router, **{"vocab_size": 300} | fields))
        folder = tmp_path / str(replayed)
        folder.mkdir()
        loop = loop_of(
            model, data, folder, steps=10, batch_size=2, logging_steps=4,
            gradient_accumulation_steps=accumulation,
        )  # fmt: skip
        if replayed:
            loop.backward = ReplayedBackward(loop.parallel, alone=accumulation == 1)
        loop.run()
        weights.append(model.state_dict())
        entries.append(
            [{k: e[k] for k in ("loss", "lm_loss", "grad_norm")} for e in loop.log.entries]
        )
    assert len(entries[0]) == 3
    assert_close(entries[0], entries[1], rtol=1e-6, atol=0)
    assert_close(weights[0], weights[1], rtol=1e-5, atol=1e-7)


def test_shapes_and_caps_are_recorded_apart(tmp_path: Path) -> None:
    model = make_model(small_config("fixed", num_recursions=3)).train()
    parallel = Parallel(model, torch.device("cpu"))
    replayed, plain = ReplayedBackward(parallel), Backward(parallel)
    for rows, cap in ((2, 3), (1, 3), (2, 1), (2, 3)):
        ids = random_ids(rows + cap, rows, 12)
        batch: dict[str, Any] = {"input_ids": ids, "labels": ids, "max_depth": cap}
        items = count_targets([batch]).float()
        found = []
        for way in (replayed, plain):
            model.zero_grad()
            loss, parts = way(NextToken(), batch, items)
            grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
            found.append((loss, parts.shares, grads))
        assert_close(*found)


def recipe_with(recipe: Recipe, **fields: Any) -> Recipe:
    return recipe.model_copy(
        update={"train": recipe.train.model_copy(update={"cuda_graphs": True})} | fields
    )


def test_without_a_gpu_nothing_changes(recipe: Recipe) -> None:
    model = make_model(small_config("fixed"))
    parallel = Parallel(model, torch.device("cpu"))
    assert type(make_backward(recipe_with(recipe), model, parallel)) is Backward


def test_refusals(recipe: Recipe) -> None:
    for router in ("random", "token_choice"):
        model = make_model(small_config(router))
        parallel = Parallel(model, torch.device("cpu"))
        with pytest.raises(MorError, match=rf"model\.router='{router}' does other .* use fixed"):
            make_backward(recipe_with(recipe), model, parallel)
    model = make_model(small_config("fixed"))
    parallel = Parallel(model, torch.device("cpu"))
    masked = recipe.data.model_copy(update={"document_mask": True})
    with pytest.raises(MorError, match=r"whole rows of text, without data\.document_mask"):
        make_backward(recipe_with(recipe, data=masked), model, parallel)
    taught = recipe_with(recipe).train.model_copy(update={"route_by_loss": RouteByLossSection()})
    with pytest.raises(MorError, match=r"train\.route_by_loss sends tokens where"):
        make_backward(recipe_with(recipe, train=taught), model, parallel)
