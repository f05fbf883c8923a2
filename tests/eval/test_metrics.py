"""Router metrics against cases made by hand."""

from __future__ import annotations

import math

import pytest
import torch

from mor.model.metrics import (
    active_fraction,
    batch_metrics,
    dead_positions,
    decision_accuracy,
    depth_shares,
    entropy,
    max_violation,
)
from mor.model.recorder import DepthTrace
from mor.model.routers import build_router
from mor.model.routers.base import Router, Scores
from mor.ops.compaction import pack
from tests.strategies import small_config

DEPTHS = torch.tensor([[1, 1, 2, 3], [1, 1, 1, 2]])  # of two rows of four tokens, at R = 3


def router() -> Router:
    """Boundaries 0, 1 and 2."""
    made = build_router(small_config("expert_choice"))
    assert isinstance(made, Router)
    made.boundary.copy_(torch.tensor([0.0, 1.0, 2.0]))
    return made


def test_shares_and_active_fraction() -> None:
    assert depth_shares(DEPTHS, 3).tolist() == [0, 5 / 8, 2 / 8, 1 / 8]
    assert active_fraction(DEPTHS, 3) == [1, 3 / 8, 1 / 8]
    assert depth_shares(torch.zeros(0, dtype=torch.long), 3).tolist() == [0, 0, 0, 0]


def test_entropy() -> None:
    by_hand = -(5 / 8 * math.log(5 / 8) + 2 / 8 * math.log(2 / 8) + 1 / 8 * math.log(1 / 8))
    assert entropy(depth_shares(DEPTHS, 3)) == pytest.approx(by_hand, rel=1e-6)
    assert entropy(torch.tensor([0.0, 1, 0])) == pytest.approx(0, abs=1e-6)
    assert entropy(torch.full((4,), 0.25)) == pytest.approx(math.log(4))


def test_max_violation() -> None:
    # Mean load 1/3, largest 5/8.
    assert max_violation(depth_shares(DEPTHS, 3)) == pytest.approx((5 / 8 - 1 / 3) * 3)
    assert max_violation(torch.tensor([0.0, 1 / 3, 1 / 3, 1 / 3])) == pytest.approx(0)
    assert max_violation(torch.tensor([1.0, 0, 0, 0])) == 0  # nothing ran: nothing to violate


def test_dead_positions() -> None:
    assert dead_positions((DEPTHS == 3).any(0)) == 3 / 4
    assert dead_positions(torch.tensor([True, True])) == 0


def test_accuracy() -> None:
    """Depth 1, boundary 1: it would let 2.0 and 1.5 go on; top-k took 2.0 and 0.9."""
    logits = torch.tensor([[2.0, 0.9, 1.5, 0.1]])
    active = torch.tensor([[True, True, False, False]])
    trace = DepthTrace(Scores(logits=logits, decision=logits), None, active)
    agree, asked = decision_accuracy(router(), trace, 1)
    assert (int(agree), int(asked)) == (2, 4)


def test_accuracy_counts_candidates_only() -> None:
    """The second row has two candidates; what stands in its empty places is no answer."""
    candidates = pack(torch.tensor([[True, True, True], [True, False, True]]))
    logits = torch.tensor([[5.0, 0.0, 5.0], [0.0, 5.0, 9.0]])
    active = torch.tensor([[True, False, True], [True, True, False]])
    trace = DepthTrace(Scores(logits=logits, decision=logits), candidates, active)
    agree, asked = decision_accuracy(router(), trace, 1)
    assert (int(agree), int(asked)) == (4, 5)


def test_a_full_capacity_agrees_always() -> None:
    logits = torch.full((1, 4), -9.0)
    trace = DepthTrace(Scores(logits=logits, decision=logits), None, torch.ones(1, 4).bool())
    agree, asked = decision_accuracy(router(), trace, 0)
    assert (int(agree), int(asked)) == (4, 4)


def test_batch_metrics() -> None:
    logits = torch.tensor([[2.0, 0.9, 1.5, 0.1], [0.0, 0.0, 0.0, 3.0]])
    everyone = DepthTrace(Scores(decision=logits), None, torch.ones(2, 4).bool())
    some = DepthTrace(Scores(decision=logits), None, DEPTHS > 1)
    found = batch_metrics(router(), DEPTHS, (everyone, some))
    assert found["mean_depth"] == 12 / 8
    assert [found[f"active_fraction/{depth}"] for depth in range(3)] == [1, 3 / 8, 1 / 8]
    assert found["dead_tokens"] == 3 / 4
    assert found["accuracy/0"] == 1
    # Boundary 1 takes tokens 0 and 2, and 7; top-k took 2, 3 and 7.
    assert found["accuracy/1"] == 6 / 8
    assert (found["boundary/0"], found["boundary/1"]) == (0, 1)
    assert "accuracy/2" not in found


def test_padding_counts_in_no_metric() -> None:
    wide = torch.cat([DEPTHS, torch.zeros_like(DEPTHS)], dim=1)
    mask = torch.arange(8).expand(2, 8) < 4
    assert batch_metrics(router(), wide, (), mask) == batch_metrics(router(), DEPTHS, ())
