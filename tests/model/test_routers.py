"""What each router selects, decides, learns from and remembers."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.strategies import (
    KV_SHARING,
    ROUTED,
    ROUTERS,
    SEEDS,
    VOCAB,
    configs,
    distinct_rows,
    make_model,
    random_ids,
    small_config,
)
from torch import Tensor
from torch.testing import assert_close

from mor import MoRConfig, MoRForCausalLM
from mor.model.router_base import RouterNet, Scores
from mor.model.routers import (
    BoundaryRouter,
    ExpertChoiceRouter,
    FixedRouter,
    RandomRouter,
    ThresholdRouter,
    TokenChoiceRouter,
    as_mask,
    batch_boundary,
    top_k_rows,
)

NEAR = {"atol": 1e-6, "rtol": 1e-6}


def scores_of(values: Tensor) -> Scores:
    return Scores(values, values, values)


def train(model: MoRForCausalLM, ids: Tensor, **how: Any) -> Any:
    return model.train()(ids, labels=ids, **how)


# Selection -------------------------------------------------------------------------------------


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


# Warm-ups --------------------------------------------------------------------------------------


@pytest.mark.parametrize("router", ["expert_choice", "threshold", "random"])
def test_capacity_warm_up_is_a_function_of_the_step_alone(router: str) -> None:
    config = small_config(router, router_capacity_warmup_steps=8)
    model = make_model(config)
    ids, gate = distinct_rows(0, [12, 12]), model.model.router
    batch = torch.stack(ids)
    for step in (0, 1, 4, 7, 8, 100):
        gate.step = step
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
            router.step = step
            router.bias.fill_(0.1)
            assert (train(model, ids).depths == 3).all()
            router.finish_step()
            assert (router.bias == 0).all()
        assert torch.equal(model.eval()(ids).depths, usual)  # the warm-up is training's alone
        router.step = 5
        assert torch.equal(train(model, ids).depths, usual)
        router.finish_step()
        assert (router.bias != 0).any()


# The running boundary ---------------------------------------------------------------------------


@given(SEEDS, st.integers(1, 40), st.data())
def test_a_boundary_separates_as_many_as_asked(seed: int, count: int, data: st.DataObject) -> None:
    values = torch.randn(1, count, generator=torch.Generator().manual_seed(seed))
    valid = torch.arange(count) < data.draw(st.integers(1, count))
    kept = data.draw(st.integers(1, int(valid.sum())))
    mask = valid[None] if data.draw(st.booleans()) or not valid.all() else None
    bound = batch_boundary(values, torch.tensor(kept), mask)
    assert int(((values > bound) & valid).sum()) == kept


@pytest.mark.parametrize("kind", [ExpertChoiceRouter, ThresholdRouter])
def test_the_boundary_lets_the_target_share_through(kind: type[BoundaryRouter]) -> None:
    """Scores of a stationary source: after some steps the causal rule keeps what top-k keeps."""
    config = small_config("threshold", router_boundary_momentum=0.95)
    router = kind(config).train()
    generator = torch.Generator().manual_seed(0)

    def draw(batch: int) -> Scores:
        return scores_of(3 * torch.randn(batch, 64, generator=generator) - 1)

    for _ in range(60):
        for _ in range(2):  # two micro-batches to a step
            scores = draw(8)
            router.observe(scores, router.select(scores, 1, None, 64, 512), 1, None)
        router.finish_step()
    assert float(router.boundary_steps[1]) == 60
    assert router.boundary[0] == 0  # a full capacity never looks
    decided = router.decide(draw(400), 1)
    assert decided is not None
    assert float(decided.float().mean()) == pytest.approx(2 / 3, abs=0.02)
    assert router.decide(draw(1), 0) is None


@pytest.mark.parametrize("kv_sharing", KV_SHARING)
def test_on_the_batch_it_learned_from_the_causal_rule_is_the_threshold(kv_sharing: str) -> None:
    model = make_model(small_config("threshold", kv_sharing))
    ids = torch.stack(distinct_rows(3, [15, 15]))
    router = model.model.router
    router.boundary_steps.zero_()
    with torch.no_grad():
        for _ in range(5):
            selected = train(model, ids).depths
            router.finish_step()
        decided = model.eval()(ids).depths
    assert torch.equal(selected, decided)


def test_the_running_mean_is_plain_at_first_and_then_has_momentum() -> None:
    config = small_config("threshold", router_boundary_momentum=0.75)
    router = ThresholdRouter(config)
    values = [1.0, 2.0, 6.0, -1.0, 3.0]
    wanted, steps = 0.0, 0
    for value in values:
        for shift in (-0.5, 0.5):  # micro-batches count alike
            router._seen[1].append(torch.tensor(value + shift))
        router.finish_step()
        keep = min(0.75, steps / (steps + 1))
        wanted, steps = keep * wanted + (1 - keep) * value, steps + 1
        assert float(router.boundary[1]) == pytest.approx(wanted)
    before = router.boundary.clone()
    router.finish_step()  # a step in which nothing was seen
    router._seen[1].append(torch.tensor(torch.nan))
    router.finish_step()  # and one that came to nothing
    assert torch.equal(router.boundary, before)


def test_evaluation_observes_nothing() -> None:
    model = make_model(small_config("threshold"))
    router = model.model.router
    ids = random_ids(0, 2, 12)
    with torch.no_grad():
        model(ids)
        model(ids, routing="topk")
        model.train()(ids, routing="causal")
        assert not any(router._seen)
        router.observing = True  # calibration
        model.eval()(ids, routing="topk")
        assert [len(seen) for seen in router._seen] == [0, 1, 1]


@pytest.mark.parametrize("activation", ["sigmoid", "tanh", "none"])
def test_the_half_rule_is_the_papers(activation: str) -> None:
    config = small_config(
        "expert_choice", router_decision_rule="half", router_activation=activation
    )
    router = ExpertChoiceRouter(config)
    router.boundary.fill_(-9.0)
    logits = torch.arange(-20, 21)[None] / 10
    shown = {"sigmoid": logits.sigmoid() >= 0.5, "tanh": logits.tanh() >= 0, "none": logits >= 0.5}
    decided = router.decide(scores_of(logits), 1)
    assert torch.equal(decided, shown[activation])
    fresh = ExpertChoiceRouter(MoRConfig(**config.to_dict() | {"router_decision_rule": "boundary"}))
    decided = fresh.decide(scores_of(logits), 1)  # before any training: the same, up to ties
    assert decided is not None
    assert int((decided != shown[activation]).sum()) <= 1


def test_ranks_take_one_mean(monkeypatch: pytest.MonkeyPatch) -> None:
    """Boundary and load are summed over ranks; here the other rank saw 5.0 once and one load."""
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    others = {2: torch.tensor([5.0, 1.0]), 3: torch.tensor([0.0, 30.0, 0.0])}
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda x: x.add_(others[len(x)]))
    router = ThresholdRouter(small_config("threshold"))
    router._seen[1] += [torch.tensor(1.0), torch.tensor(3.0)]
    router.finish_step()
    assert router.boundary.tolist() == pytest.approx([5.0, 3.0, 5.0])
    choice = TokenChoiceRouter(small_config("token_choice", router_balancing="loss_free"))
    choice._load = torch.tensor([20.0, 0.0, 10.0])
    choice.finish_step()  # 20, 30, 10 of a mean of 20
    assert choice.bias.tolist() == pytest.approx([0.0, -0.001, 0.001])


# Losses and their gradients ----------------------------------------------------------------------


def gradients(model: MoRForCausalLM, loss: Tensor) -> dict[str, float]:
    names, parameters = zip(*model.named_parameters(), strict=True)
    found = torch.autograd.grad(loss, parameters, allow_unused=True, retain_graph=True)
    return {
        name: 0.0 if grad is None else float(grad.abs().max())
        for name, grad in zip(names, found, strict=True)
    }


def test_the_auxiliary_router_learns_alone() -> None:
    """Its loss moves it and nothing else; the language-model loss never moves it."""
    model = make_model(small_config("expert_choice", router_objective="aux_router"))
    out = train(model, random_ids(0, 2, 12))
    assert set(out.router_losses) == {"aux_router_loss"}
    moved = gradients(model, out.router_losses["aux_router_loss"])
    for name, size in moved.items():
        assert (size > 0) == name.startswith("model.router.auxiliary."), name
    moved = gradients(model, out.lm_loss)
    assert moved["model.router.auxiliary.weight"] == 0
    assert moved["model.router.net.weight"] > 0


def test_the_auxiliary_router_decides() -> None:
    model = make_model(small_config("expert_choice", router_objective="aux_router"))
    ids = random_ids(0, 2, 12)
    with torch.no_grad():
        before = [model(ids, routing=kind).depths for kind in ("causal", "topk")]
        model.model.router.auxiliary.weight.neg_()
        after = [model(ids, routing=kind).depths for kind in ("causal", "topk")]
    assert not torch.equal(before[0], after[0])
    assert torch.equal(before[1], after[1])


def test_the_auxiliary_loss_reaches_the_trunk() -> None:
    """As in the authors' code: the targets are constants, the logits are not."""
    model = make_model(small_config("expert_choice"))
    moved = gradients(model, train(model, random_ids(0, 2, 12)).router_losses["aux_loss"])
    assert moved["model.block.0.mlp.up_proj.weight"] > 0
    assert moved["model.embed_tokens.weight"] > 0
    assert moved["model.router.net.weight"] > 0


@pytest.mark.parametrize("router", ROUTED)
def test_routing_learns_through_the_gate(router: str) -> None:
    model = make_model(small_config(router))
    moved = gradients(model, train(model, random_ids(0, 2, 12)).lm_loss)
    assert (moved.get("model.router.net.weight", 0.0) > 0) == (router != "random")


def test_balancing_loss_is_one_at_balance_and_more_elsewhere() -> None:
    config = small_config("token_choice", router_alpha=1.0)
    router = TokenChoiceRouter(config).train()
    logits = torch.eye(3).repeat(4, 1)[None] * 5
    for rows, wanted in ((logits, 1.0), (logits[:, :1].expand(1, 12, 3), None)):
        scores = Scores(gate=rows[..., 0], logits=rows, choice=rows.argmax(-1))
        loss = float(router.losses(scores, None, 0, None)["balancing_loss"])
        peak = float(rows[0, 0].softmax(-1).max())
        assert loss == pytest.approx(1.0 if wanted else 3 * peak, abs=1e-5)
        assert router.losses(scores, None, 1, None) == {}


def test_loss_free_bias_follows_the_load_and_never_enters_the_gate() -> None:
    config = small_config("token_choice", router_balancing="loss_free", router_alpha=1.0)
    model = make_model(config)
    router = model.model.router
    assert isinstance(router, TokenChoiceRouter)
    router.bias.zero_()
    ids = random_ids(0, 2, 12)
    with torch.no_grad():
        for _ in range(2):  # micro-batches add up
            depths = train(model, ids).depths
        assert train(model, ids).router_losses is None
        router._load = 2 * torch.stack([(depths == d).sum() for d in (1, 2, 3)]).float()
        load = router._load.clone()
        router.finish_step()
        assert_close(router.bias, 0.001 * torch.sign(load.mean() - load))
        assert router._load is None
        hidden = torch.randn(2, 5, 32)
        gates = []
        for bias in (0.0, 2.0):
            router.bias.copy_(torch.tensor([0.0, 0.0, bias]))
            started = router.start(hidden, 3)
            assert started is not None
            assert started.choice is not None
            chances = started.logits.softmax(-1)
            assert torch.equal(started.choice, (chances + router.bias).argmax(-1))
            picked = chances.gather(-1, started.choice[..., None]).squeeze(-1)
            assert_close(started.gate, picked)
            gates.append(started.gate)
        assert (started.choice == 2).all()
        assert (gates[0] - gates[1]).abs().max() > 0


def test_the_load_counts_each_real_token_once() -> None:
    model = make_model(small_config("token_choice"))
    ids = random_ids(0, 3, 9)
    mask = torch.arange(9) < torch.tensor([9, 4, 1])[:, None]
    with torch.no_grad():
        depths = model.train()(ids, attention_mask=mask).depths
        depths2 = model(ids[:1]).depths
    every = torch.cat((depths[mask], depths2[0]))
    assert model.model.router._load.tolist() == [int((every == d).sum()) for d in (1, 2, 3)]


# The controls ------------------------------------------------------------------------------------


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


# Caps, updates and nets ------------------------------------------------------------------------


@pytest.mark.parametrize("cap", [1, 2, 3])
@pytest.mark.parametrize("routing", ["causal", "topk"])
@pytest.mark.parametrize("router", ROUTERS)
def test_a_cap_only_cuts(router: str, routing: str, cap: int) -> None:
    model = make_model(small_config(router))
    ids = random_ids(0, 2, 15)
    with torch.no_grad():
        free = model(ids, routing=routing)
        cut = model(ids, routing=routing, max_depth=cap)
    assert torch.equal(cut.depths, free.depths.clamp(max=cap))
    if cap == 3:
        assert torch.equal(cut.logits, free.logits)


@pytest.mark.parametrize("cap", [0, 4, -1])
def test_a_cap_outside_the_recursions_is_refused(cap: int) -> None:
    model = make_model(small_config("fixed"))
    with pytest.raises(ValueError, match=rf"max_depth={cap} must lie in 1\.\.num_recursions=3"):
        model(random_ids(0, 1, 3), max_depth=cap)


def test_token_choice_leaves_by_its_gate_even_where_a_cap_cuts_it() -> None:
    """h0 + g block(h0): the cap moves the exit, not the weight of what comes out."""
    config = small_config("token_choice", num_prelude_layers=0, num_coda_layers=0, router_alpha=0.7)
    model = make_model(config)
    ids = random_ids(0, 1, 11)
    network = model.model
    with torch.no_grad():
        out = network(ids, max_depth=1)
        origin = network.embed(ids)
        chances = 0.7 * (origin @ network.router.net.weight[0].T).softmax(-1)
        gate = chances.gather(-1, (chances + network.router.bias).argmax(-1, keepdim=True))
        network.router = FixedRouter(config)
        block = network(ids, max_depth=1).hidden
    assert_close(out.hidden, origin + gate * block, **NEAR)


@given(configs(routers=("expert_choice", "threshold"), update_rule="residual"), SEEDS, st.data())
def test_residual_with_full_gates_is_the_plain_recursive_model(
    config: MoRConfig, seed: int, data: st.DataObject
) -> None:
    """g = 1 and every token at every depth: h + (block(h) - h)."""
    config.router_capacities = [1.0] * config.num_recursions
    model = make_model(config, seed, torch.float64)
    router = model.model.router
    assert isinstance(router, BoundaryRouter)
    router.gate = torch.ones_like  # type: ignore[method-assign]
    fields = config.to_dict() | {"router": "fixed", "router_activation": None}
    plain = make_model(MoRConfig(**fields), seed, torch.float64)
    weights = {k: v for k, v in model.state_dict().items() if ".router." not in k}
    plain.load_state_dict(weights)
    ids = random_ids(seed, 2, data.draw(st.integers(1, 12)))
    with torch.no_grad():
        for routing in ("causal", "topk"):
            routed = model(ids, routing=routing, use_cache=False)
            assert_close(routed.logits, plain(ids, use_cache=False).logits, **NEAR)


@pytest.mark.parametrize(
    ("rule", "formula"),
    [
        ("gated", lambda h, y, g: h + g * y),
        ("additive", lambda h, y, g: h + y),
        ("residual", lambda h, y, g: h + g * (y - h)),
    ],
)
def test_update_rules(rule: str, formula: Any) -> None:
    router = ExpertChoiceRouter(small_config("expert_choice", update_rule=rule))
    h, y, g = torch.randn(2, 5, 8), torch.randn(2, 5, 8), torch.rand(2, 5)
    assert_close(router.combine(h, y, g), formula(h, y, g[..., None]))
    assert_close(router.combine(h, y, None), formula(h, y, 1.0))
    low = router.combine(h.bfloat16(), y.bfloat16(), g)
    assert low.dtype == torch.bfloat16


@given(
    st.sampled_from(["linear", "mlp", "wide_mlp"]),
    st.sampled_from([1.0, 0.3]),
    st.integers(1, 4),
    st.integers(1, 3),
    SEEDS,
)
def test_a_depth_for_each_token_equals_one_for_all(
    architecture: Any, temperature: float, sets: int, outputs: int, seed: int
) -> None:
    torch.manual_seed(seed)
    config = small_config(
        "threshold", router_architecture=architecture, router_temperature=temperature
    )
    net = RouterNet(config, sets, outputs)
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter)
    hidden = torch.randn(2, 6, 32)
    index = torch.randint(sets, (2, 6))
    mixed = net(hidden, index)
    assert mixed.shape == (2, 6, outputs)
    for depth in range(sets):
        assert_close(mixed[index == depth], net(hidden, depth)[index == depth])


def test_temperature_divides_what_the_router_reads() -> None:
    nets = []
    for temperature in (1.0, 4.0):
        torch.manual_seed(0)
        net = RouterNet(small_config("threshold", router_temperature=temperature), 1, 1)
        torch.nn.init.normal_(net.weight)
        nets.append(net)
    hidden = torch.randn(3, 32)
    assert_close(nets[1](hidden, 0), nets[0](hidden / 4, 0))


# Precision -------------------------------------------------------------------------------------


@pytest.mark.parametrize("router", ROUTED)
def test_routers_keep_float32_when_the_model_is_narrowed(router: str) -> None:
    model = make_model(small_config(router))
    state = {k: v.clone() for k, v in model.model.router.state_dict().items()}
    for narrow in (model.bfloat16, model.half, lambda: model.to(torch.bfloat16)):
        narrow()
        assert model.model.block[0].mlp.up_proj.weight.dtype != torch.float32
        for name, value in model.model.router.state_dict().items():
            assert value.dtype == torch.float32
            assert torch.equal(value, state[name])
    model.bfloat16()
    with torch.no_grad():
        out = model(random_ids(0, 2, 12), output_router_traces=True)
    assert out.logits.dtype == torch.bfloat16
    assert out.traces[0].scores.gate.dtype == torch.float32
    assert {v.dtype for v in model.double().model.router.state_dict().values()} <= {torch.float64}


@pytest.mark.parametrize("kv_sharing", KV_SHARING)
@pytest.mark.parametrize("router", ROUTERS)
def test_mixed_precision_training_keeps_scores_in_float32(router: str, kv_sharing: str) -> None:
    model = make_model(small_config(router, kv_sharing))
    ids = random_ids(0, 2, 12)
    plain = train(model, ids, output_router_traces=True)
    torch.manual_seed(0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = train(model, ids, output_router_traces=True)
    out.loss.backward()
    assert_close(out.loss, plain.loss, atol=0.3, rtol=0.1)
    for trace in out.traces:
        if trace.scores.logits is not None:
            assert trace.scores.logits.dtype == torch.float32
    for parameter in model.parameters():
        assert parameter.grad is None or parameter.grad.isfinite().all()
