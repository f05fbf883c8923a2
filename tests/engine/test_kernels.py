"""What a tick does in one kernel call is the plain form's, number by number."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.testing import assert_close

from mor.engine import Engine, SamplingParams
from mor.model.routers.base import Router
from mor.ops import native
from tests.engine.oracle import greedy
from tests.strategies import make_model, random_ids, small_config

pytestmark = pytest.mark.skipif(native.library() is None, reason=native.missing())


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"router_activation": "tanh"},
        {"router_activation": "none", "router_decision_rule": "half"},
        {"router_gate_bias": 0.3, "router_init_bias": 0.5},
        {"router_capacities": [1.0, 0.6, 0.3]},
    ],
)
def test_a_boundary_routers_answer_in_one_call(fields: dict[str, Any]) -> None:
    """The same bits as scoring, then deciding, with kernels for each."""
    router = make_model(small_config("expert_choice", head_dim=16, **fields)).model.router
    torch.manual_seed(1)
    with torch.inference_mode():
        router.boundary.copy_(torch.randn(3) / 10)
        hidden = torch.randn(1, 37, router.config.hidden_size)
        depths, places = torch.randint(3, (1, 37)), torch.arange(37)[None]
        scores, goes = router.answer(hidden, depths, places, None)
        wanted, decided = Router.answer(router, hidden, depths, places, None)
    assert goes is not None
    assert decided is not None
    assert 0 < goes.sum() < 37
    assert torch.equal(goes, decided)
    assert wanted.gate is not None
    assert wanted.logits is not None
    assert torch.equal(scores.gate, wanted.gate)  # type: ignore[arg-type]
    assert torch.equal(scores.logits, wanted.logits)  # type: ignore[arg-type]
    assert torch.equal(scores.decision, wanted.decision)  # type: ignore[arg-type]


@pytest.mark.parametrize("page_size", [1, 5, 16])
def test_rows_read_with_entries_of_their_own_in_place_of_some(page_size: int) -> None:
    """KV sharing with update, over pages of any size: log-probabilities of the padded form."""
    model = make_model(small_config("threshold", "recursive_update", head_dim=16))
    prompts = [random_ids(i, 3 + 9 * i).tolist() for i in range(5)]
    asked: list[SamplingParams] = [greedy(6, logprobs=2)] * 5
    found = []
    for attention in ("native", "padded"):
        engine = Engine(model, attention=attention, page_size=page_size, max_model_len=64)
        found.append([out.completions[0] for out in engine.generate(prompts, asked)])
    for one, other in zip(*found, strict=True):
        assert one.token_ids == other.token_ids
        assert one.depths == other.depths
        assert len(set(one.depths) | set(one.prompt_depths)) > 1
        for a, b in zip(one.logprobs or (), other.logprobs or (), strict=True):
            assert_close(a.logprob, b.logprob, atol=1e-5, rtol=1e-5)
