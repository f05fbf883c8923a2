"""The running estimate of the boundary, and what is decided by it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mor import MoRConfig
from mor.model.routers import (
    BoundaryRouter,
    ExpertChoiceRouter,
    ThresholdRouter,
    TokenChoiceRouter,
    batch_boundary,
)
from mor.model.routers.base import Candidates, Scores
from tests.strategies import (
    KV_SHARING,
    SEEDS,
    distinct_rows,
    make_model,
    random_ids,
    scores_of,
    small_config,
    train,
)

NEAR = {"atol": 1e-6, "rtol": 1e-6}
EVERYONE = Candidates(None, 64, 512)


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
            router.observe(scores, router.select(scores, 1, EVERYONE), 1, EVERYONE)
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
            router.noted.append((1, torch.tensor(value + shift)))
        router.finish_step()
        keep = min(0.75, steps / (steps + 1))
        wanted, steps = keep * wanted + (1 - keep) * value, steps + 1
        assert float(router.boundary[1]) == pytest.approx(wanted)
    before = router.boundary.clone()
    router.finish_step()  # a step in which nothing was seen
    router.noted.append((1, torch.tensor(torch.nan)))
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
        assert not router.noted
        model.eval()
        router.train()  # the router alone, over a trunk in evaluation mode
        model(ids, routing="topk")
        assert [depth for depth, _ in router.noted] == [1, 2]


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
    router.noted += [(1, torch.tensor(1.0)), (1, torch.tensor(3.0))]
    router.finish_step()
    assert router.boundary.tolist() == pytest.approx([5.0, 3.0, 5.0])
    choice = TokenChoiceRouter(small_config("token_choice", router_balancing="loss_free"))
    choice.noted.append((0, torch.tensor([20.0, 0.0, 10.0])))
    choice.finish_step()  # 20, 30, 10 of a mean of 20
    assert choice.bias.tolist() == pytest.approx([0.0, -0.001, 0.001])
