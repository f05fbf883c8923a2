"""What each router selects, when it warms up, and the two controls."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mor import MoRConfig
from mor.model.routers import (
    ExpertChoiceRouter,
    RandomRouter,
    TokenChoiceRouter,
    as_mask,
    top_k_rows,
)
from mor.model.routers.base import Scores
from tests.strategies import (
    ROUTED,
    SEEDS,
    VOCAB,
    configs,
    distinct_rows,
    make_model,
    random_ids,
    scores_of,
    small_config,
    train,
)

NEAR = {"atol": 1e-6, "rtol": 1e-6}


# Selection ----------------------------------------------------------------------------------------


@given(
    SEEDS,
    st.floats(0.01, 1.0),
    st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=4),
)
def test_top_k_keeps_the_largest_of_each_row(
    seed: int, capacity: float, rows: list[tuple[int, int]]
) -> None:
    """``max(1, trunc(capacity x tokens))`` of the candidates, and only of the candidates."""
    candidates = torch.tensor([there for there, _ in rows])
    lengths = candidates + torch.tensor([more for _, more in rows])
    width = max(1, int(candidates.max()))
    valid = torch.arange(width) < candidates[:, None]
    values = torch.randn(len(rows), width, generator=torch.Generator().manual_seed(seed))
    mask = as_mask(top_k_rows(values, capacity, valid, lengths), values, valid)
    for row, (there, _) in enumerate(rows):
        kept = min(there, max(1, int(capacity * int(lengths[row]))))
        if capacity == 1:
            kept = there
        best = sorted(values[row, :there].tolist(), reverse=True)[:kept]
        assert sorted(values[row][mask[row]].tolist(), reverse=True) == best


@given(SEEDS, st.floats(0.01, 0.99), st.integers(1, 17), st.integers(1, 3))
def test_top_k_by_index_and_by_mask_agree(
    seed: int, capacity: float, width: int, batch: int
) -> None:
    values = torch.randn(batch, width, generator=torch.Generator().manual_seed(seed)).round(
        decimals=1
    )
    index = top_k_rows(values, capacity, None, width)
    if index is not None:
        assert index.dtype == torch.long
        assert torch.equal(index, index.sort(1).values)
    mask = top_k_rows(values, capacity, torch.ones_like(values).bool(), width)
    assert torch.equal(as_mask(index, values, None), as_mask(mask, values, None))


@pytest.mark.parametrize("recursions", [2, 3, 4])
def test_default_capacities_truncate_to_the_papers_counts(recursions: int) -> None:
    """Floor((R - i) T / R) for every T up to 2048: floats must not lose a token."""
    config = small_config("expert_choice", num_recursions=recursions)
    router = ExpertChoiceRouter(config).eval()
    for depth in range(1, recursions):
        capacity = router.capacity(depth)
        for length in range(1, 2049):
            exact = max(1, (recursions - depth) * length // recursions)
            assert max(1, int(capacity * length)) == exact
        lengths = torch.arange(1, 2049)
        mask = top_k_rows(torch.randn(2048, 8), capacity, None, lengths)
        assert mask is not None
        exact = ((recursions - depth) * lengths // recursions).clamp(1, 8)
        assert torch.equal(mask.sum(1), exact)


@given(
    configs(routers=("expert_choice", "random")),
    SEEDS,
    st.integers(1, 24),
    st.booleans(),
)
def test_capacity_of_each_depth_is_filled_exactly(
    config: MoRConfig, seed: int, length: int, training: bool
) -> None:
    model = make_model(config, seed).train(training)
    with torch.no_grad():
        depths = model(random_ids(seed, 2, length), routing="topk", use_cache=False).depths
    for depth, capacity in enumerate(config.router_capacities):
        count = length if capacity == 1 else max(1, int(capacity * length))
        assert (depths > depth).sum(1).tolist() == [count, count]


@given(configs(routers=("threshold",)), SEEDS, st.lists(st.integers(1, 15), min_size=1, max_size=4))
def test_threshold_fills_capacity_over_the_whole_batch(
    config: MoRConfig, seed: int, lengths: list[int]
) -> None:
    model = make_model(config, seed)
    width = max(lengths)
    ids = torch.zeros(len(lengths), width, dtype=torch.long)
    mask = torch.arange(width) < torch.tensor(lengths)[:, None]
    ids[mask] = torch.cat(distinct_rows(seed, lengths))
    with torch.no_grad():
        depths = model(ids, attention_mask=mask, routing="topk", use_cache=False).depths
    previous = sum(lengths)
    for depth, capacity in enumerate(config.router_capacities):
        wanted = min(previous, max(1, round(capacity * sum(lengths))))
        assert int((depths > depth).sum()) == wanted
        previous = wanted


def test_a_row_that_has_left_still_counts_towards_the_threshold(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Row 0 scores higher throughout: it takes all of depth 1, and 0.4 of 16 tokens at depth 2."""
    model = make_model(small_config("threshold", router_capacities=[1.0, 0.5, 0.4]))
    order = torch.randperm(16, generator=torch.Generator().manual_seed(0)).float().view(2, 8)
    order[0] += 16

    def score(hidden: Tensor, depth: int, positions: Tensor, started: None) -> Scores:
        return scores_of(order[: len(positions)].gather(1, positions))

    monkeypatch.setattr(model.model.router, "score", score)
    ids, more = random_ids(0, 2, 8), random_ids(0, 2, 9)
    with torch.no_grad():
        plain = model(ids, routing="topk").depths
        mask = torch.ones_like(more).index_fill(1, torch.tensor([8]), 0)
        padded = model(more, routing="topk", attention_mask=mask).depths[:, :8]
    for depths in (plain, padded):
        assert (depths > 1).sum(1).tolist() == [8, 0]
        assert (depths > 2).sum(1).tolist() == [6, 0]


@given(configs(routers=ROUTED), SEEDS, st.integers(1, 24), st.sampled_from(["causal", "topk"]))
def test_nobody_comes_back(config: MoRConfig, seed: int, length: int, routing: str) -> None:
    """Tokens of depth r are candidates of depth r + 1, and no others; scores are shaped so."""
    model = make_model(config, seed)
    with torch.no_grad():
        out = model(
            random_ids(seed, 2, length), routing=routing, use_cache=False, output_router_traces=True
        )
    for depth, trace in enumerate(out.traces):
        there = torch.arange(2 * length).view(2, length)
        if trace.candidates is not None:
            places = trace.candidates.gather(there)
            valid = trace.candidates.valid
            there = places if valid is None else places[valid]
        wanted = (out.depths.flatten() >= depth).nonzero().flatten()
        assert sorted(there.flatten().tolist()) == wanted.tolist()
        assert int(trace.active.sum()) == int((out.depths > depth).sum())


# Warm-ups -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("router", ["expert_choice", "threshold", "random"])
def test_capacity_warm_up_is_a_function_of_the_step_alone(router: str) -> None:
    config = small_config(router, router_capacity_warmup_steps=8)
    model = make_model(config)
    ids, gate = distinct_rows(0, [12, 12]), model.model.router
    batch = torch.stack(ids)
    for step in (0, 1, 4, 7, 8, 100):
        gate.begin_step(step)
        done = min(1.0, step / 8)
        warm = [c + (1 - c) * 0.5 * (1 + math.cos(math.pi * done)) for c in (1, 2 / 3, 1 / 3)]
        model.train()
        for _ in range(2):  # however often it is called
            assert [gate.capacity(depth) for depth in range(3)] == pytest.approx(warm)
            with torch.no_grad():
                depths = model(batch).depths
        for depth in range(3):
            share = (depths > depth).float().mean().item()
            assert abs(share - warm[depth]) < 1 / 12
        model.eval()
        assert [gate.capacity(depth) for depth in range(3)] == pytest.approx([1, 2 / 3, 1 / 3])
    assert gate.step == 100


def test_balance_warm_up_sends_everyone_to_the_end() -> None:
    config = small_config(
        "token_choice", router_balancing="loss_free", router_balance_warmup_steps=5
    )
    model = make_model(config)
    ids, router = random_ids(0, 2, 12), model.model.router
    assert isinstance(router, TokenChoiceRouter)
    with torch.no_grad():
        usual = model(ids).depths
        assert len(usual.unique()) > 1
        for step in (0, 4):
            router.begin_step(step)
            router.bias.fill_(0.1)
            assert (train(model, ids).depths == 3).all()
            router.finish_step()
            assert (router.bias == 0).all()
        assert torch.equal(model.eval()(ids).depths, usual)  # the warm-up is training's alone
        router.begin_step(5)
        assert torch.equal(train(model, ids).depths, usual)
        router.finish_step()
        assert (router.bias != 0).any()


# The controls -------------------------------------------------------------------------------------


def random_router(**fields: Any) -> RandomRouter:
    router = RandomRouter(small_config("random", **fields))
    return router.eval()


@given(st.sampled_from([None, [0.9, 0.5, 0.2], [0.5, 0.5, 0.5]]), st.integers(0, 100_000))
def test_random_depths_are_nested_and_near_capacity(
    capacities: list[float] | None, start: int
) -> None:
    router = random_router(router_capacities=capacities)
    positions = torch.arange(start, start + 4096)[None]
    before = torch.ones_like(positions).bool()
    for depth, capacity in enumerate(router.config.router_capacities):
        scores = router.score(torch.empty(1, 4096, 32), depth, positions, None)
        decided = as_mask(router.decide(scores, depth), positions, None)
        assert float(decided.float().mean()) == pytest.approx(capacity, abs=0.035)
        assert not (decided & ~before).any()
        before = decided
        # No drift along the text either: each eighth has its share.
        for part in decided.view(8, -1):
            assert float(part.float().mean()) == pytest.approx(capacity, abs=0.1)


def test_random_gates_are_spread_as_in_training() -> None:
    """Training's gates are the winners' draws: uniform in [1 - x, 1] for a share of x."""
    router = random_router(router_alpha=0.5)
    positions = torch.arange(6000)[None]
    for depth, share in enumerate([1.0, 2 / 3, 1 / 2]):
        gate = router.score(torch.empty(1, 6000, 32), depth, positions, None).gate
        router.train()
        draw = router.score(torch.empty(1, 6000, 32), depth, positions, None)
        best = as_mask(top_k_rows(draw.logits, share, None, 6000), positions, None)
        router.eval()
        for quantile in (0.05, 0.5, 0.95):
            wanted = 0.5 * (1 - share + share * quantile)
            assert float(gate.quantile(quantile)) == pytest.approx(wanted, abs=0.015)
            assert float(draw.gate[best].quantile(quantile)) == pytest.approx(wanted, abs=0.015)


def test_random_training_draws_anew_and_evaluation_does_not() -> None:
    model = make_model(small_config("random"))
    ids = random_ids(0, 2, 24)
    with torch.no_grad():
        first, second = model(ids), model(ids)
        other = model((ids + 1) % VOCAB)
        assert torch.equal(first.logits, second.logits)
        assert torch.equal(first.depths, other.depths)  # the route knows the position only
        assert torch.equal(first.depths[0], first.depths[1])
        first, second = model.train()(ids), model(ids)
        assert not torch.equal(first.depths, second.depths)
        causal = model(ids, routing="causal")
        assert torch.equal(causal.depths, other.depths)


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_fixed_depth_is_the_same_for_all(depth: int) -> None:
    model = make_model(small_config("fixed", router_fixed_depth=depth))
    ids = random_ids(0, 2, 7)
    with torch.no_grad():
        out = model(ids)
        assert (out.depths == depth).all()
        assert (model(ids, max_depth=1).depths == 1).all()
        assert (model.train()(ids).depths == depth).all()
        model.eval()
        model.config.router_fixed_depth = None
        assert (model(ids).depths == 3).all()
        assert torch.equal(model(ids, max_depth=depth).logits, out.logits)
    assert model.model.router.state_dict() == {}
