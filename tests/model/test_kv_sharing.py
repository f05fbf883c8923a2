"""KV sharing computes no keys, values or queries that it does not need; fast equals plain."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.testing import assert_close

from mor import MoRConfig, MoRForCausalLM
from mor.model.attend import among, shared
from tests import dense
from tests.strategies import (
    KV_SHARING,
    ROUTED,
    SEEDS,
    configs,
    distinct_rows,
    make_model,
    pad_rows,
    padding_masks,
    random_ids,
    small_config,
)

NEAR = {"atol": 1e-7, "rtol": 1e-7}


def tokens_through(module: nn.Module, model: MoRForCausalLM, ids: Tensor, **how: object) -> list:
    """Token counts of each call of ``module`` in one forward."""
    counts: list[int] = []
    hook = module.register_forward_hook(lambda _, args, __: counts.append(args[0][..., 0].numel()))
    with torch.no_grad():
        model(ids, use_cache=False, **how)
    hook.remove()
    return counts


@pytest.mark.parametrize("kv_sharing", KV_SHARING)
@pytest.mark.parametrize("router", ["expert_choice", "random"])
def test_a_recursion_over_k_tokens_costs_k_tokens(router: str, kv_sharing: str) -> None:
    """Queries, keys and feed-forward: only of the tokens selected, at R = 3 and T = 18."""
    model = make_model(small_config(router, kv_sharing))
    layer, ids = model.model.block[0], random_ids(0, 2, 18)
    assert tokens_through(layer.mlp, model, ids, routing="topk") == [36, 24, 12]
    assert tokens_through(layer.self_attn.q_proj, model, ids, routing="topk") == [36, 24, 12]
    keys = tokens_through(layer.self_attn.k_proj, model, ids, routing="topk")
    values = tokens_through(layer.self_attn.v_proj, model, ids, routing="topk")
    # Under `propagate` the 12 that leave at either depth leave a last key and value.
    wanted = {"recursive": [36], "propagate": [36, 12, 24, 12, 12]}
    assert keys == values == wanted.get(kv_sharing, [36, 24, 12])


@pytest.mark.parametrize("kv_sharing", KV_SHARING)
def test_decoding_runs_only_the_depths_a_token_takes(kv_sharing: str) -> None:
    model = make_model(small_config("threshold", kv_sharing))
    ids = random_ids(1, 1, 20)
    with torch.no_grad():
        start = model(ids[:, :1])
    layer, cache = model.model.block[0], start.past_key_values
    calls = {"mlp": 0, "k_proj": 0}

    def counter(name: str) -> Callable[..., None]:
        def count(*_: object) -> None:
            calls[name] += 1

        return count

    layer.mlp.register_forward_hook(counter("mlp"))
    layer.self_attn.k_proj.register_forward_hook(counter("k_proj"))
    depths = []
    with torch.no_grad():
        for place in range(1, 20):
            out = model(ids[:, place : place + 1], past_key_values=cache)
            depths.append(int(out.depths))
    assert len(set(depths)) > 1
    assert calls["mlp"] == sum(depths)
    left = sum(depth < 3 for depth in depths)
    wanted = {"recursive": 19, "propagate": sum(depths) + left}
    assert calls["k_proj"] == wanted.get(kv_sharing, sum(depths))


@given(
    configs(),
    SEEDS,
    st.lists(st.integers(1, 17), min_size=1, max_size=3),
    st.sampled_from(["causal", "topk"]),
    st.data(),
)
def test_attention_without_a_mask_equals_attention_with_one(
    config: MoRConfig, seed: int, lengths: list[int], routing: str, data: st.DataObject
) -> None:
    """The network with its fast forms of attention against itself with plain masked ones."""
    model = make_model(config, seed, torch.float64)
    ids, mask = pad_rows(distinct_rows(seed, lengths), data.draw(padding_masks(lengths)), seed)
    parameters = list(model.parameters())
    plain_forms = {
        (among, "segment_attention"): dense.segment_attention,
        (shared, "shared_segment_attention"): dense.shared_segment_attention,
        (shared, "prefix_attention"): dense.prefix_attention,
    }
    results = []
    for forms in ({}, plain_forms):
        with pytest.MonkeyPatch.context() as patch:
            for (room, name), form in forms.items():
                patch.setattr(room, name, form)
            out = model(ids, attention_mask=mask, routing=routing, use_cache=False)
        loss = out.logits[mask.bool()].square().mean()
        grads = torch.autograd.grad(loss, parameters, materialize_grads=True)
        results.append((out.logits[mask.bool()], grads))
    (fast, fast_grads), (plain, plain_grads) = results
    assert_close(fast, plain, **NEAR)
    for one, two in zip(fast_grads, plain_grads, strict=True):
        assert_close(one, two, **NEAR)


@given(configs(), SEEDS, st.sampled_from(["causal", "topk"]))
def test_end_to_end_equals_padded_rows(config: MoRConfig, seed: int, routing: str) -> None:
    """The same tokens whether rows are laid end to end or padded to the longest (with a cache)."""
    model = make_model(config, seed, torch.float64)
    ids = torch.stack(distinct_rows(seed, [13] * 3))
    with torch.no_grad():
        flat = model(ids, routing=routing, use_cache=False)
        padded = model(ids, routing=routing, use_cache=True)
    assert torch.equal(flat.depths, padded.depths)
    assert_close(flat.logits, padded.logits, **NEAR)


@given(
    configs(routers=("fixed",), kv_sharing=("recursive_update",), router_fixed_depth=None), SEEDS
)
def test_update_by_all_tokens_is_no_sharing_at_all(config: MoRConfig, seed: int) -> None:
    model = make_model(config, seed, torch.float64)
    ids = random_ids(seed, 2, 9)
    with torch.no_grad():
        shared = model(ids, use_cache=False).logits
        config.kv_sharing = "none"
        assert_close(shared, model(ids, use_cache=False).logits, **NEAR)


@pytest.mark.parametrize("router", ROUTED)
def test_the_three_modes_are_three_models(router: str) -> None:
    """Or else every test that goes through them would go through one."""
    ids = random_ids(0, 2, 12)
    logits = []
    for kind in KV_SHARING:
        model = make_model(small_config(router), 2)
        model.config.kv_sharing = kind
        with torch.no_grad():
            logits.append(model(ids, use_cache=False).logits)
    for one, two in ((0, 1), (0, 2), (1, 2)):
        assert (logits[one] - logits[two]).abs().max() > 1e-3


def test_shared_keys_learn_from_every_depth_that_reads_them() -> None:
    """The gradient of k_proj under sharing is not that of depth 0 alone."""
    model = make_model(small_config("fixed", "recursive"))
    ids = random_ids(0, 2, 9)
    weight = model.model.block[0].self_attn.k_proj.weight
    grads = []
    for cap in (1, 3):
        loss = model(ids, use_cache=False, max_depth=cap).logits.square().mean()
        grads.append(torch.autograd.grad(loss, weight)[0])
    assert grads[1].abs().max() > 0
    keys: list[Tensor] = []
    projection = model.model.block[0].self_attn.k_proj
    handle = projection.register_forward_hook(lambda _, __, output: keys.append(output))
    loss = model(ids, use_cache=False).logits.square().mean()
    handle.remove()
    assert len(keys) == 1
    (through_keys,) = torch.autograd.grad(loss, keys[0])
    assert through_keys.abs().max() > 1e-6
