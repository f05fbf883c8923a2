"""The recursion with its compaction against the plain, uncompacted reference."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from mor import MoRConfig, MoRForCausalLM
from tests.reference import reference
from tests.strategies import (
    KV_SHARING,
    ROUTED,
    SEEDS,
    configs,
    distinct_rows,
    make_model,
    pad_rows,
    padding_masks,
    small_config,
)

ROUGH = {"atol": 1e-4, "rtol": 1e-4}


def compare(
    model: MoRForCausalLM,
    lengths: list[int],
    masks: list[list[bool]],
    seed: int,
    causal: bool,
    max_depth: int | None = None,
) -> torch.Tensor:
    """Logits, depths, router losses and every gradient; returns the depths."""
    rows = distinct_rows(seed, lengths)
    expected = reference(model, rows, causal=causal, max_depth=max_depth)
    if not causal and model.config.router != "random":  # which draws anew in training
        model.model.router.train()  # what makes the router losses appear
    ids, mask = pad_rows(rows, masks, seed)
    found = model(
        ids,
        attention_mask=mask,
        use_cache=False,
        routing="causal" if causal else "topk",
        max_depth=max_depth,
    )
    real = mask.bool()
    logits = torch.cat(expected.logits)
    assert torch.equal(found.depths[real], torch.cat(expected.depths))
    assert (found.depths[~real] == 0).all()
    near = {"atol": 1e-6, "rtol": 1e-6} if model.dtype == torch.float64 else ROUGH
    assert_close(found.logits[real], logits, **near)
    losses = found.router_losses or {}
    if not causal:
        assert losses.keys() == expected.losses.keys()
        for name, value in losses.items():
            assert_close(value.to(model.dtype), expected.losses[name].to(model.dtype), **near)
    weight = torch.randn(logits.shape, generator=torch.Generator().manual_seed(seed)) / len(logits)
    parameters = dict(model.named_parameters())
    grads = []
    for values, terms in ((found.logits[real], losses), (logits, expected.losses)):
        total = (values * weight).sum()
        if not causal:
            total = total + sum(terms.values())
        grads.append(torch.autograd.grad(total, list(parameters.values()), materialize_grads=True))
    for name, one, two in zip(parameters, *grads, strict=True):
        scale = max(1.0, float(two.abs().max()))
        assert_close(one / scale, two / scale, **near, msg=lambda m, n=name: f"{n}: {m}")
    return found.depths


@given(configs(), SEEDS, st.lists(st.integers(1, 17), min_size=1, max_size=3), st.data())
def test_rows_run_as_in_the_reference(
    config: MoRConfig, seed: int, lengths: list[int], data: st.DataObject
) -> None:
    model = make_model(config, seed, torch.float64)
    masks = data.draw(padding_masks(lengths))
    compare(model, lengths, masks, seed, causal=data.draw(st.booleans()))


@pytest.mark.parametrize("kv_sharing", KV_SHARING)
@pytest.mark.parametrize("router", ROUTED)
@pytest.mark.parametrize("causal", [True, False])
def test_each_router_and_kv_mode_over_odd_lengths(
    router: str, kv_sharing: str, causal: bool
) -> None:
    fields = {"router_z_loss_coef": 0.01, "num_recursion_layers": 2, "update_rule": "residual"}
    model = make_model(small_config(router, kv_sharing, **fields))
    depths = compare(model, [13], [[True] * 13], 3, causal)
    assert len(depths.unique()) == 3
    compare(model, [9, 5], [[True] * 9, [True] * 5 + [False] * 4], 4, causal)


@given(configs(), SEEDS, st.integers(1, 3), st.booleans())
def test_a_cap_on_depth_is_the_network_cut_there(
    config: MoRConfig, seed: int, cap: int, causal: bool
) -> None:
    cap = min(cap, config.num_recursions)
    depths = compare(
        make_model(config, seed, torch.float64), [11], [[True] * 11], seed, causal, max_depth=cap
    )
    assert int(depths.max()) <= cap
