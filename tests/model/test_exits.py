"""Exits: the stream after each recursion through coda and head, and a training loss there."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from mor import MoRConfig
from mor.errors import ConfigError
from mor.model import DepthCache
from mor.model.flops import flops_per_token
from tests.strategies import (
    KV_SHARING,
    distinct_rows,
    make_model,
    pad_rows,
    random_ids,
    small_config,
)

NEAR = {"atol": 1e-10, "rtol": 1e-10}
LOSS: dict[str, Any] = {"atol": 1e-6, "rtol": 1e-6, "check_dtype": False}  # losses are float32
BY_DEPTH = ("fixed", "expert_choice", "threshold", "random")  # decide depth by depth
MASKS = [[True] * 9, [False, True, True, False, True, True, True, False, True]]


@pytest.mark.parametrize("kv_sharing", KV_SHARING)
@pytest.mark.parametrize("router", BY_DEPTH)
def test_an_exit_is_the_model_with_its_depth_capped(router: str, kv_sharing: str) -> None:
    """With padding and documents; one stream and two by turns."""
    streams = 1 + (BY_DEPTH.index(router) + KV_SHARING.index(kv_sharing)) % 2
    config = small_config(router, kv_sharing, recursion_streams=streams)
    model = make_model(config, dtype=torch.float64)
    ids, mask = pad_rows(distinct_rows(0, [9, 6]), MASKS)
    documents = torch.tensor([[0] * 4 + [1] * 5, [0] * 9])
    for inputs in ({}, {"attention_mask": mask}, {"document_ids": documents}):
        with torch.no_grad():
            out = model.model(ids, exits=(1, 2, 3), routing="causal", **inputs)
            assert out.exits[3] is out.hidden
            for passes in (1, 2, 3):
                capped = model.model(ids, max_depth=passes, routing="causal", **inputs)
                assert_close(out.exits[passes], capped.hidden, **NEAR)
            capped = model.model(ids, exits=(1, 2, 3), max_depth=2, routing="causal", **inputs)
            assert capped.exits.keys() == {1, 2}


@pytest.mark.parametrize("router", ["fixed", "threshold", "token_choice"])
def test_the_loss_at_exits_is_added_with_its_weights(router: str) -> None:
    """Summed over micro-batches, in training only, and the same without logits."""
    config = small_config(router, exit_loss_weights=[0.5, 0.25])
    model = make_model(config, dtype=torch.float64).train()
    ids = random_ids(0, 3, 11)
    out = model(ids, labels=ids)
    assert out.exit_losses.keys() == {1, 2}
    exits = model.model(ids, exits=(1, 2)).exits
    for passes, loss in out.exit_losses.items():
        logits = model.model.head(exits[passes][:, :-1]).flatten(0, 1)
        assert_close(loss, F.cross_entropy(logits, ids[:, 1:].flatten()), **LOSS)
    terms = (out.router_losses or {}).items()
    routers = sum(model.model.router.loss_weight(name) * term for name, term in terms)
    parts = out.lm_loss + 0.5 * out.exit_losses[1] + 0.25 * out.exit_losses[2] + routers
    assert_close(out.loss, parts, **LOSS)
    assert_close(model(ids, labels=ids, return_logits=False).loss, out.loss, **LOSS)
    halved = model(ids, labels=ids, num_items_in_batch=60)
    assert_close(halved.exit_losses[1] * 2, out.exit_losses[1], **LOSS)
    assert model(ids, labels=ids, max_depth=2).exit_losses.keys() == {1}
    model.eval()
    assert model(ids, labels=ids).exit_losses is None
    assert_close(model(ids, labels=ids).loss, model(ids, labels=ids).lm_loss, **LOSS)


def test_an_exit_of_weight_zero_costs_nothing() -> None:
    config = small_config("fixed", exit_loss_weights=[0.0, 0.5])
    model = make_model(config).train()
    ids = random_ids(0, 2, 11)
    assert model(ids, labels=ids).exit_losses.keys() == {2}
    plain = flops_per_token(small_config("fixed"), 64)
    with_exits = flops_per_token(config, 64)
    assert with_exits.forward == plain.forward
    more = with_exits.training - plain.training
    assert more == pytest.approx(3 * (plain.coda + plain.head))


def test_what_cannot_be_is_refused() -> None:
    model = make_model(small_config("threshold"))
    ids = random_ids(0, 1, 5)
    with pytest.raises(ValueError, match=r"exits=\[4\] must lie in 1..num_recursions=3"):
        model.model(ids, exits=[4])
    with pytest.raises(ValueError, match="exits cannot be given with a cache"):
        model.model(ids, exits=[1], cache=DepthCache(model.config))
    with pytest.raises(ConfigError, match="must be a list of 2 weights"):
        MoRConfig(num_recursions=3, exit_loss_weights=[1.0])
    with pytest.raises(ConfigError, match="exit_loss_weights=-1"):
        MoRConfig(num_recursions=3, exit_loss_weights=[1.0, -1.0])
    with pytest.raises(ConfigError, match="needs passes of the whole block"):
        MoRConfig(num_recursions=2, sharing="sequence", exit_loss_weights=[1.0])
