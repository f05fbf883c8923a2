"""Boundaries of single requests: each as if the checkpoint had been calibrated for it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from mor.engine import Engine, SamplingParams
from mor.errors import MorError
from tests.engine.oracle import greedy, idle, run
from tests.strategies import make_model, small_config

PROMPTS = [[5, 9, 2, 30, 11, 7, 7, 18], [3]]


@pytest.mark.parametrize("router", ["threshold", "expert_choice"])
@pytest.mark.parametrize("rule", ["boundary", "half"])
def test_mixed_requests_equal_models_of_their_own(router: str, rule: str) -> None:
    config = small_config(router, router_decision_rule=rule)
    model = make_model(config, 3).to(torch.float64)
    stored: Any = model.model.router.boundary
    choices: list[list[float] | None] = [
        None,
        [0.0, 1e9, 1e9],
        [0.0, -1e9, -1e9],
        (stored - 0.3).tolist(),
        (stored + 0.3).tolist(),
    ]
    engine = Engine(model, max_num_seqs=4, max_model_len=48, page_size=4, prefill_chunk=4)
    # Twice, so that lanes of requests with boundaries are used again by requests without.
    asked = [(prompt, own) for prompt in PROMPTS for own in choices] * 2
    for number, (prompt, own) in enumerate(asked):
        engine.add_request(prompt, greedy(8, boundaries=own), str(number))
    done = run(engine)
    depths = set()
    for number, (prompt, own) in enumerate(asked):
        alone = copy.deepcopy(model)
        if own is not None:
            router_: Any = alone.model.router
            router_.boundary.copy_(torch.tensor(own))
            alone.config.router_decision_rule = "boundary"
        (wanted,) = Engine(alone, max_model_len=48).generate([prompt], greedy(8))
        found = done[str(number)].completions[0]
        assert found.token_ids == wanted.completions[0].token_ids
        assert found.depths == wanted.completions[0].depths
        assert found.prompt_depths == wanted.completions[0].prompt_depths
        depths.add(found.depths)
    assert len(depths) > 3
    idle(engine)


def test_what_is_refused() -> None:
    with pytest.raises(MorError, match="list of numbers"):
        SamplingParams(boundaries=0.5)  # type: ignore[arg-type]
    with pytest.raises(MorError, match=r"boundaries\[1\]='x'"):
        SamplingParams(boundaries=[0.5, "x"])  # type: ignore[list-item]
    engine = Engine(make_model(small_config("threshold")), max_model_len=20)
    with pytest.raises(MorError, match="2 entries"):
        engine.add_request([1], SamplingParams(boundaries=[0.5, 0.5]))
    engine = Engine(make_model(small_config("token_choice")), max_model_len=20)
    with pytest.raises(MorError, match="stores none"):
        engine.add_request([1], SamplingParams(boundaries=[0.5, 0.5, 0.5]))
