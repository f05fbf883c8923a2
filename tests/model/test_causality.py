"""A later token never changes an earlier output under the causal rule, for any router."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from mor import MoRConfig, MoRForCausalLM
from mor.model.routers import ROUTERS as ROUTER_CLASSES
from tests.strategies import (
    KV_SHARING,
    ROUTERS,
    SEEDS,
    configs,
    make_model,
    random_ids,
    small_config,
)

STRICT = {"atol": 1e-5, "rtol": 1e-5}  # also in float32, for the plain models


def check_prefix(model: MoRForCausalLM, seed: int, length: int, cut: int, **how: Any) -> None:
    """The first ``cut`` tokens: alone, followed by some tokens, and followed by others."""
    how["use_cache"] = False
    ids, other = random_ids(seed, 2, length), random_ids(seed + 1, 2, length)
    other[:, :cut] = ids[:, :cut]
    with torch.no_grad():
        one, two, alone = model(ids, **how), model(other, **how), model(ids[:, :cut], **how)
    for later in (one, two):
        assert torch.equal(later.depths[:, :cut], alone.depths)
        assert_close(later.logits[:, :cut], alone.logits, **STRICT)


@given(configs(), SEEDS, st.integers(2, 24), st.data())
def test_later_tokens_never_change_earlier_outputs(
    config: MoRConfig, seed: int, length: int, data: st.DataObject
) -> None:
    model = make_model(config, seed, torch.float64)
    cut = data.draw(st.integers(1, length - 1))
    check_prefix(model, seed, length, cut, routing="causal")
    check_prefix(model, seed, length, cut)  # what evaluation does when not told otherwise
    cap = data.draw(st.integers(1, config.num_recursions))
    check_prefix(model, seed, length, cut, routing="causal", max_depth=cap)


@pytest.mark.parametrize("kv_sharing", KV_SHARING)
@pytest.mark.parametrize("router", ROUTERS)
def test_every_router_with_every_kv_mode_is_causal(router: str, kv_sharing: str) -> None:
    model = make_model(small_config(router, kv_sharing))
    for cut in range(1, 13):
        check_prefix(model, cut, 13, cut, routing="causal")


@given(
    configs(routers=tuple(r for r in ROUTERS if not ROUTER_CLASSES[r].looks_ahead)),
    SEEDS,
    st.integers(1, 11),
    st.booleans(),
)
def test_routers_that_do_not_look_ahead_are_causal_in_training_too(
    config: MoRConfig, seed: int, cut: int, training: bool
) -> None:
    check_prefix(
        make_model(config, seed, torch.float64).train(training), seed, 12, cut, routing="topk"
    )


@pytest.mark.parametrize("kv_sharing", KV_SHARING)
@pytest.mark.parametrize("router", ROUTERS)
def test_looks_ahead_says_what_topk_does(router: str, kv_sharing: str) -> None:
    model = make_model(small_config(router, kv_sharing), dtype=torch.float64)
    ids = random_ids(5, 4, 16)
    with torch.no_grad():
        whole = model(ids, routing="topk", use_cache=False)
        moved = []
        for cut in range(2, 15):
            part = model(ids[:, :cut], routing="topk", use_cache=False)
            moved.append(float((part.logits - whole.logits[:, :cut]).abs().max()))
    if ROUTER_CLASSES[router].looks_ahead:
        assert max(moved) > 1e-2
    else:
        assert max(moved) < 1e-5
    assert {r for r in ROUTERS if ROUTER_CLASSES[r].looks_ahead} == {
        "expert_choice",
        "threshold",
        "random",
    }


def test_expert_choice_in_training_lets_a_later_token_move_an_earlier_one() -> None:
    model = make_model(small_config("expert_choice")).train()
    ids = random_ids(5, 1, 12)
    logits, depths = [], []
    for last in range(20):
        ids[0, -1] = last
        with torch.no_grad():
            out = model(ids, use_cache=False)
        logits.append(out.logits[0, :-1])
        depths.append(out.depths[0, :-1])
    assert any(not torch.equal(depths[0], other) for other in depths)
    assert max(float((logits[0] - other).abs().max()) for other in logits) > 1e-2
