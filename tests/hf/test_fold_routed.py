"""Folds with a router: they start as the folded model, and what stays bounded."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.testing import assert_close

from mor.hf.fold.fold import fold
from mor.hf.fold.plan import Folding
from tests.hf.folding import vanilla
from tests.strategies import random_ids

ROUTED = [
    (router, kv_sharing)
    for router in ("threshold", "expert_choice", "token_choice")
    for kv_sharing in ("none", "recursive", "recursive_update", "propagate")
]


@pytest.mark.parametrize(("router", "kv_sharing"), ROUTED)
@pytest.mark.parametrize("training", [False, True])
def test_a_router_starts_as_the_folded_model(router: Any, kv_sharing: Any, training: bool) -> None:
    """At every spread of router weights, logits are as near as gates are to 1."""
    source, ids = vanilla(8), random_ids(0, 3, 12)
    plain = fold(source, Folding(3, kv_sharing=kv_sharing)).train(training)
    with torch.no_grad():
        expected = plain(ids, use_cache=False).logits
    nearness = []
    for std in (0.0, 1e-5, 1e-3):
        folding = Folding(3, kv_sharing=kv_sharing, router=router, router_std=std)
        routed = fold(source, folding).train(training)
        assert routed.config.update_rule == "residual"
        with torch.no_grad():
            out = routed(ids, use_cache=False, output_router_traces=True)
        assert (out.depths == 3).all()
        gates = torch.cat([trace.scores.gate.flatten() for trace in out.traces])
        nearness.append(float((gates - 1).abs().max()))
        assert (out.logits - expected).abs().max() < 1e-4 + 20 * nearness[-1]
    assert nearness[0] < 1e-6 < nearness[1] < 1e-3 < nearness[2] < 0.1


@pytest.mark.parametrize("router", ["threshold", "expert_choice"])
def test_capacity_falls_from_full_depth_as_training_goes_on(router: Any) -> None:
    routed = fold(vanilla(8), Folding(3, router=router, capacity_warmup_steps=10)).train()
    ids, means = random_ids(0, 4, 24), []
    for step in (0, 3, 6, 10):
        routed.model.router.begin_step(step)
        with torch.no_grad():
            means.append(float(routed(ids).depths.float().mean()))
    assert means[0] == 3
    assert means == sorted(means, reverse=True)
    assert means[-1] == pytest.approx(2, abs=0.05)
    # What training saw becomes the rule of decoding.
    routed.model.router.finish_step()
    assert (routed.model.router.boundary[1:] > -100).all()


def test_gates_stay_bounded_whatever_a_router_learns() -> None:
    routed = fold(vanilla(8), Folding(3, router="threshold"))
    router: Any = routed.model.router
    low, middle, high = router.gate(torch.tensor([-50.0, 0.0, 50.0]))
    assert low < 1e-6
    assert middle == pytest.approx(1, abs=1e-6)
    assert high == pytest.approx(1.1353, abs=1e-3)


def test_relaxations_without_rank_start_as_the_bare_fold() -> None:
    source, ids = vanilla(8), random_ids(0, 2, 9)
    with torch.no_grad():
        bare = fold(source, Folding(3))(ids).logits
        for relaxation in ("gains", "embeddings"):
            folded = fold(source, Folding(3, relaxation=relaxation))  # type: ignore[arg-type]
            assert_close(folded(ids).logits, bare, rtol=0, atol=0)


def test_the_source_stays_as_it_was_and_the_seed_decides() -> None:
    source = vanilla(8)
    before = {name: t.clone() for name, t in source.state_dict().items()}
    folding = Folding(3, init="random", router="threshold", relaxation="lora", rank=2, seed=5)
    one, two = (fold(source, folding).state_dict() for _ in range(2))
    for name, tensor in source.state_dict().items():
        assert torch.equal(tensor, before[name])
    for name, tensor in one.items():
        assert torch.equal(tensor, two[name]), name
