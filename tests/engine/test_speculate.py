"""Guesses change no token: greedy and seeded ones are equal, others have the same distribution."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mor.engine import Engine
from mor.engine.attend import padded_attention, row_attention
from tests.engine.oracle import Oracle, greedy, idle
from tests.strategies import KV_SHARING, ROUTERS, make_model, random_ids, small_config

NEW = 9


def speculating(model: Any, **knobs: Any) -> Engine:
    knobs = {"max_model_len": 40, "page_size": 4, "num_pages": 2000, "speculate": 3} | knobs
    return Engine(model, speculate_always=True, **knobs)


@pytest.mark.parametrize("kv_sharing", KV_SHARING)
@pytest.mark.parametrize("router", ROUTERS)
def test_greedy_tokens_and_depths_are_those_without(router: str, kv_sharing: str) -> None:
    model = make_model(small_config(router, kv_sharing), 1, torch.float64)
    oracle = Oracle(model)
    knobs: list[dict[str, Any]] = [
        {"max_num_seqs": 1, "page_size": 1, "speculate": 1, "prefill_chunk": 2},
        {"max_num_seqs": 3, "page_size": 3, "draft_depth": 2, "min_gather": 3},
        {"prefill_chunk": 5, "speculate": 4},
    ]
    accepted = 0
    for knob, attention in zip(knobs, [row_attention, padded_attention] * 2, strict=False):
        engine = speculating(model, attention=attention, **knob)
        every = [random_ids(i, 2 + i).tolist() for i in range(4)]
        for output in engine.generate(every, greedy(NEW)):
            oracle.check(output, NEW)
        idle(engine)
        stats = engine.stats
        assert stats.drafts > 0
        accepted += stats.accepted_tokens
        print(router, kv_sharing, stats.drafts, stats.draft_tokens, stats.accepted_tokens)
    assert accepted
