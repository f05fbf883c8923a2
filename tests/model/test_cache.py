"""Decoding with a cache is the full causal forward, and the cache holds active tokens only."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from mor import MoRConfig, MoRForCausalLM
from mor.model import DepthCache
from mor.model.cache import KVGroup
from tests.strategies import (
    KV_SHARING,
    ROUTERS,
    SEEDS,
    configs,
    distinct_rows,
    make_model,
    pad_rows,
    padding_masks,
    random_ids,
    small_config,
)

CLOSE = {"atol": 1e-4, "rtol": 1e-4}
EXACT = {"atol": 1e-7, "rtol": 1e-7}


def decode(
    model: MoRForCausalLM,
    cache: DepthCache,
    ids: Tensor,
    mask: Tensor,
    cuts: list[int],
    start: int = 0,
) -> tuple[Tensor, Tensor]:
    """Logits and depths of columns ``start``.. of ids, in chunks that end at ``cuts`` and at T."""
    logits, depths = [], []
    with torch.no_grad():
        for end in [*cuts, ids.shape[1]]:
            if end > start:
                out = model.model(ids[:, start:end], attention_mask=mask[:, :end], cache=cache)
                logits.append(model.model.head(out.hidden))
                depths.append(out.depths)
                start = end
    return torch.cat(logits, 1), torch.cat(depths, 1)


def full(model: MoRForCausalLM, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        out = model(ids, attention_mask=mask, use_cache=False, routing="causal")
    return out.logits, out.depths


def check_contents(model: MoRForCausalLM, cache: DepthCache, depths: Tensor, mask: Tensor) -> None:
    """Entries per group and row, and bytes, counted by hand from depths [B, T]."""
    config = model.config
    tokens = mask.sum(1)
    assert cache.seen is not None
    assert cache.prelude is not None
    assert cache.coda is not None
    assert torch.equal(cache.seen, tokens)
    assert torch.equal(cache.prelude.lengths, tokens)
    assert torch.equal(cache.coda.lengths, tokens)
    ran = [(depths > depth).sum(1) for depth in range(config.num_recursions)]
    if config.kv_sharing == "recursive":
        ran = ran[:1]
    if config.kv_sharing == "propagate":  # every depth knows every token
        ran = [tokens] * config.num_recursions
    assert [g.lengths.tolist() for g in cache.depths] == [count.tolist() for count in ran]
    entry = 2 * config.num_key_value_heads * config.head_dim * model.dtype.itemsize
    private = config.num_prelude_layers + config.num_coda_layers
    block = config.num_recursion_layers * sum(int(count.sum()) for count in ran)
    assert cache.nbytes() == entry * (private * int(tokens.sum()) + block)
    if cache.nbytes():  # a cache that never held anything knows no dtype
        assert cache.vanilla_nbytes() == entry * config.num_hidden_layers * int(tokens.sum())
    assert cache.allocated_nbytes() >= cache.nbytes()


@given(configs(), SEEDS, st.lists(st.integers(1, 14), min_size=1, max_size=3), st.data())
def test_chunks_of_any_size_equal_the_full_forward(
    config: MoRConfig, seed: int, lengths: list[int], data: st.DataObject
) -> None:
    model = make_model(config, seed, torch.float64)
    ids, mask = pad_rows(distinct_rows(seed, lengths), data.draw(padding_masks(lengths)), seed)
    cuts = sorted(data.draw(st.sets(st.integers(1, ids.shape[1]), max_size=5)))
    cache = DepthCache(config)
    logits, depths = decode(model, cache, ids, mask, cuts)
    wanted_logits, wanted_depths = full(model, ids, mask)
    real = mask.bool()
    assert torch.equal(depths, wanted_depths)
    assert_close(logits[real], wanted_logits[real], **EXACT)
    check_contents(model, cache, depths, mask)


@pytest.mark.parametrize("kv_sharing", KV_SHARING)
@pytest.mark.parametrize("router", ROUTERS)
def test_token_by_token_equals_the_full_forward(router: str, kv_sharing: str) -> None:
    config = small_config(router, kv_sharing, num_recursion_layers=2)
    model = make_model(config, 4)
    lengths, masks = [12, 7], [[True] * 12, [False] * 5 + [True] * 7]
    ids, mask = pad_rows(distinct_rows(1, lengths), masks)
    cache = DepthCache(config)
    logits, depths = decode(model, cache, ids, mask, list(range(1, 12)))
    wanted_logits, wanted_depths = full(model, ids, mask)
    assert torch.equal(depths, wanted_depths)
    assert_close(logits[mask.bool()], wanted_logits[mask.bool()], **CLOSE)
    check_contents(model, cache, depths, mask)
    if router != "fixed":
        assert len(depths[mask.bool()].unique()) == 3
        assert (cache.nbytes() < cache.vanilla_nbytes()) == (kv_sharing != "propagate")


@given(configs(), SEEDS, st.integers(2, 12), st.data())
def test_crop_then_continue_equals_fresh(
    config: MoRConfig, seed: int, length: int, data: st.DataObject
) -> None:
    """Taken back to any earlier token, then led on with others, as speculative decoding does."""
    model = make_model(config, seed, torch.float64)
    kept = [data.draw(st.integers(0, length)) for _ in range(2)]
    ids, other = random_ids(seed, 2, length), random_ids(seed + 1, 2, length)
    ones = torch.ones_like(ids)
    cache = DepthCache(config)
    decode(model, cache, ids, ones, [length // 2])
    cache.crop_tokens(torch.tensor(kept))
    with torch.no_grad():
        out = model.model(other, cache=cache)
        found = model.model.head(out.hidden)
    for row, count in enumerate(kept):
        whole = torch.cat((ids[row, :count], other[row]))[None]
        logits, depths = full(model, whole, torch.ones_like(whole))
        assert torch.equal(out.depths[row], depths[0, count:])
        assert_close(found[row], logits[0, count:], **EXACT)
    assert cache.seen is not None
    assert cache.seen.tolist() == [count + length for count in kept]


@given(configs(), SEEDS, st.integers(1, 9), st.lists(st.integers(0, 2), min_size=1, max_size=5))
def test_rows_chosen_anew_go_on_as_their_own(
    config: MoRConfig, seed: int, length: int, chosen: list[int]
) -> None:
    """Reordered, repeated and left out: what beams do."""
    model = make_model(config, seed, torch.float64)
    masks = [[True] * length, [False] * (length - 1) + [True], [True] * length]
    ids, mask = pad_rows([random_ids(seed + i, sum(m)) for i, m in enumerate(masks)], masks, seed)
    cache = DepthCache(config)
    decode(model, cache, ids, mask, [length // 2])
    index = torch.tensor(chosen)
    cache.select_rows(index)
    more = random_ids(seed + 7, len(chosen), 3)
    ids = torch.cat((ids[index], more), 1)
    mask = torch.cat((mask[index], torch.ones_like(more)), 1)
    logits, depths = decode(model, cache, ids, mask, [length + 1], start=length)
    wanted_logits, wanted_depths = full(model, ids, mask)
    assert torch.equal(depths, wanted_depths[:, length:])
    assert_close(logits, wanted_logits[:, length:], **EXACT)
    check_contents(model, cache, wanted_depths, mask)


@pytest.mark.parametrize("kv_sharing", KV_SHARING)
@pytest.mark.parametrize("router", ["fixed", "expert_choice"])
def test_rows_grow_past_their_first_room(router: str, kv_sharing: str) -> None:
    config = small_config(router, kv_sharing)
    model = make_model(config)
    ids = random_ids(3, 2, 150)
    mask = torch.ones_like(ids)
    cache = DepthCache(config)
    logits, depths = decode(model, cache, ids, mask, [1, 2, 66, 67, 68, 140, 141])
    assert cache.prelude is not None
    assert cache.prelude.tokens.shape[1] > 66  # it did grow
    wanted_logits, wanted_depths = full(model, ids, mask)
    assert torch.equal(depths, wanted_depths)
    assert_close(logits, wanted_logits, **CLOSE)
    check_contents(model, cache, depths, mask)


@pytest.mark.parametrize("kv_sharing", KV_SHARING)
@pytest.mark.parametrize("router", ROUTERS)
def test_a_depth_cap_while_decoding(router: str, kv_sharing: str) -> None:
    model = make_model(small_config(router, kv_sharing))
    ids = random_ids(0, 2, 9)
    cache = DepthCache(model.config)
    with torch.no_grad():
        whole = model(ids, max_depth=2, use_cache=False)
        parts = [model.model(ids[:, i : i + 3], cache=cache, max_depth=2) for i in (0, 3, 6)]
        logits = model.model.head(torch.cat([part.hidden for part in parts], 1))
    assert torch.equal(torch.cat([part.depths for part in parts], 1), whole.depths)
    assert_close(logits, whole.logits, **CLOSE)
    if kv_sharing != "recursive":
        # Under `propagate` a later call without the cap would see how these tokens ended.
        assert (cache.depths[2].nbytes() == 0) == (kv_sharing != "propagate")


@pytest.mark.parametrize("kv_sharing", KV_SHARING)
def test_gradients_through_the_first_cached_forward(kv_sharing: str) -> None:
    """Evaluation mode keeps a cache by default; that must not stand in a gradient's way."""
    model = make_model(small_config("expert_choice", kv_sharing))
    ids = random_ids(0, 2, 9)
    grads = []
    for use_cache in (True, False):
        logits = model(ids, use_cache=use_cache).logits
        wanted = list(model.model.block.parameters())
        grads.append(torch.autograd.grad(logits.square().mean(), wanted))
    for one, two in zip(*grads, strict=True):
        assert_close(one, two, **CLOSE)


@pytest.mark.parametrize("kv_sharing", KV_SHARING)
def test_gradients_through_several_cached_forwards(kv_sharing: str) -> None:
    """Entries are written where they lie; what an earlier backward pass needs stays what it was."""
    model = make_model(small_config("threshold", kv_sharing))
    ids, cache, logits = random_ids(0, 2, 9), DepthCache(model.config), []
    for part in ids.split((3, 1, 2, 3), dim=1):
        logits.append(model.model.head(model.model(part, cache=cache).hidden))
    grads = []
    for found in (torch.cat(logits, 1), model(ids, use_cache=False, routing="causal").logits):
        wanted = list(model.model.block.parameters())
        grads.append(torch.autograd.grad(found.square().mean(), wanted))
    for one, two in zip(*grads, strict=True):
        assert_close(one, two, **CLOSE)


@pytest.mark.parametrize("kv_sharing", KV_SHARING)
def test_a_cache_begun_in_inference_mode_goes_on_without(kv_sharing: str) -> None:
    model = make_model(small_config("threshold", kv_sharing))
    ids, cache = random_ids(0, 2, 9), DepthCache(model.config)
    with torch.inference_mode():
        model.model(ids[:, :4], cache=cache)
        cache.select_rows(torch.tensor([0, 1]))
        model.model(ids[:, 4:5], cache=cache)
    with torch.no_grad():
        found = model.model.head(model.model(ids[:, 5:], cache=cache).hidden)
        assert_close(found, model(ids, use_cache=False).logits[:, 5:], **CLOSE)


def test_padding_that_is_no_number_never_enters_the_cache() -> None:
    model = make_model(small_config("threshold"))
    ids, mask = pad_rows(
        distinct_rows(0, [8, 3]), [[True] * 8, [True, False, False, True] + [False] * 3 + [True]]
    )
    embeds = model.get_input_embeddings()(ids).masked_fill(~mask[..., None].bool(), torch.nan)
    cache = DepthCache(model.config)
    logits = []
    with torch.no_grad():
        for start in (0, 3, 5):
            end = {0: 3, 3: 5, 5: 8}[start]
            out = model.model(
                inputs_embeds=embeds[:, start:end], attention_mask=mask[:, :end], cache=cache
            )
            logits.append(model.model.head(out.hidden))
    wanted, _ = full(model, ids, mask)
    assert_close(torch.cat(logits, 1)[mask.bool()], wanted[mask.bool()], **CLOSE)
    assert all(t.isfinite().all() for g in cache.groups() for t in g.keys.values())


def test_a_cache_of_another_batch_is_refused() -> None:
    model = make_model(small_config("fixed"))
    cache = DepthCache(model.config)
    with torch.no_grad():
        model.model(random_ids(0, 2, 3), cache=cache)
        with pytest.raises(ValueError, match="holds 2 rows but input_ids has 3"):
            model.model(random_ids(0, 3, 1), cache=cache)


@given(st.lists(st.lists(st.integers(0, 5), min_size=2, max_size=2), min_size=1, max_size=30))
def test_a_group_gives_back_what_was_written(steps: list[list[int]]) -> None:
    """Rows that grow at different speeds, as depths do; garbage after the real entries."""
    group = KVGroup(2, torch.device("cpu"))
    rows = torch.arange(2)
    kept: list[list[Tensor]] = [[], []]
    for number, counts in enumerate(steps):
        width = max(1, *counts)
        slots = group.reserve(rows, torch.tensor(counts), width)
        key = torch.full((2, 1, width, 2), float(number)) + torch.arange(width)[:, None] / 10
        group.write(0, rows, slots, key, -key)
        for row, count in enumerate(counts):
            kept[row] += list(key[row, 0, :count])
    key, value = group.read(0, None)
    assert group.lengths.tolist() == [len(row) for row in kept]
    for row, entries in enumerate(kept):
        if entries:
            assert torch.equal(key[row, 0, : len(entries)], torch.stack(entries))
            assert torch.equal(value[row, 0, : len(entries)], -torch.stack(entries))
    assert group.nbytes() == sum(map(len, kept)) * 2 * 2 * 4
