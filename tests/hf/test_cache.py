"""``MoRCache`` under the names that Transformers calls it by."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from transformers import StaticCache
from transformers.cache_utils import Cache

from mor import MoRCache, MoRForCausalLM
from tests.strategies import KV_SHARING, ROUTED, ROUTERS, make_model, random_ids, small_config

CLOSE = {"atol": 1e-4, "rtol": 1e-4}


def prefilled(model: MoRForCausalLM, ids: Tensor) -> MoRCache:
    with torch.no_grad():
        cache = model(ids).past_key_values
    assert isinstance(cache, MoRCache)
    return cache


def follow(model: MoRForCausalLM, cache: MoRCache, ids: Tensor, more: Tensor) -> None:
    """What comes next with the cache is what comes next without."""
    with torch.no_grad():
        found = model(more, past_key_values=cache)
        wanted = model(torch.cat((ids, more), 1), use_cache=False)
    assert torch.equal(found.depths, wanted.depths[:, ids.shape[1] :])
    assert_close(found.logits, wanted.logits[:, ids.shape[1] :], **CLOSE)


def test_it_is_a_cache_of_transformers() -> None:
    model = make_model(small_config("threshold"))
    cache = MoRCache(model.config)
    assert isinstance(cache, Cache)
    assert not cache.is_initialized
    assert not cache.is_compileable
    assert cache.is_croppable
    assert cache.get_seq_length() == 0
    assert cache.nbytes() == cache.vanilla_nbytes() == cache.allocated_nbytes() == 0
    ids = random_ids(0, 2, 9)
    with torch.no_grad():
        out = model(ids, past_key_values=cache)
    assert out.past_key_values is cache
    assert cache.is_initialized
    assert cache.get_seq_length() == 9
    assert cache.get_max_length() == cache.get_max_cache_shape() == -1
    assert len(cache) == len(cache.groups()) == 5  # prelude, three depths, coda
    assert "entries per group and row=[[9, 9]" in repr(cache)
    cache.reset()
    assert cache.get_seq_length() == 0
    follow(model, cache, ids[:, :0], ids)


@pytest.mark.parametrize("kv_sharing", KV_SHARING)
@pytest.mark.parametrize("router", ROUTERS)
def test_beams_are_reordered_repeated_and_chosen(router: str, kv_sharing: str) -> None:
    model = make_model(small_config(router, kv_sharing))
    ids, more = random_ids(0, 3, 8), random_ids(1, 6, 4)
    order = torch.tensor([2, 0, 0])
    cache = prefilled(model, ids)
    cache.reorder_cache(order)
    follow(model, cache, ids[order], more[:3])
    cache = prefilled(model, ids)
    cache.batch_repeat_interleave(2)
    follow(model, cache, ids.repeat_interleave(2, 0), more)
    cache = prefilled(model, ids)
    cache.batch_select_indices(torch.tensor([1]))
    follow(model, cache, ids[1:2], more[:1])


@pytest.mark.parametrize("kv_sharing", KV_SHARING)
@pytest.mark.parametrize("router", ROUTERS)
def test_crop_takes_tokens_back(router: str, kv_sharing: str) -> None:
    model = make_model(small_config(router, kv_sharing))
    ids, more = random_ids(0, 2, 9), random_ids(1, 2, 3)
    # Three of them by turns, so that every router and every mode meets all.
    every = ((-4, 5), (5, 5), (-9, 0), (-20, 0), (0, 9), (9, 9), (30, 9))
    turn = 2 * (ROUTERS.index(router) + KV_SHARING.index(kv_sharing))
    for argument, left in (every[(turn + place) % 7] for place in range(3)):
        cache = prefilled(model, ids)
        bytes_before = cache.nbytes()
        cache.crop(argument)
        assert cache.get_seq_length() == left
        assert (cache.nbytes() < bytes_before) == (left < 9)
        follow(model, cache, ids[:, :left], more)


def test_crop_leaves_left_padding_where_it_is() -> None:
    model = make_model(small_config("threshold", "recursive_update"))
    ids, more = random_ids(0, 2, 9), random_ids(1, 2, 3)
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[1, :4] = 0
    with torch.no_grad():
        cache = model(ids, attention_mask=mask[:, :9]).past_key_values
        cache.crop(-2)
        assert cache.get_seq_length() == 7
        assert cache.seen.tolist() == [7, 3]
        joined = torch.cat((ids[:, :7], more), 1)
        found = model(more, attention_mask=mask[:, :10], past_key_values=cache)
        wanted = model(joined, attention_mask=mask[:, :10], use_cache=False)
    assert_close(found.logits, wanted.logits[:, 7:], **CLOSE)


@pytest.mark.parametrize("kv_sharing", KV_SHARING)
@pytest.mark.parametrize("router", ROUTED)
def test_bytes_follow_the_routing(router: str, kv_sharing: str) -> None:
    """Counted by hand: 2 KV heads of 8 floats, twice, for each token that ran a layer.

    But under `propagate`, where every depth knows every token.
    """
    model = make_model(small_config(router, kv_sharing, num_recursion_layers=2))
    ids = random_ids(0, 2, 20)
    with torch.no_grad():
        out = model(ids)
    cache, entry = out.past_key_values, 2 * 2 * 8 * 4
    runs = {"recursive": 40, "propagate": 3 * 40}.get(kv_sharing, int(out.depths.sum()))
    assert cache.nbytes() == entry * (2 * 40 + 2 * runs)
    assert cache.vanilla_nbytes() == entry * (2 + 6) * 40
    assert (cache.nbytes() < cache.vanilla_nbytes()) == (kv_sharing != "propagate")
    if kv_sharing == "propagate":
        return
    shallow = prefilled(model, ids)
    with torch.no_grad():
        shallow = model(ids, max_depth=1).past_key_values
    assert shallow.nbytes() == entry * 4 * 40


def test_a_copy_is_another_cache() -> None:
    model = make_model(small_config("expert_choice", "recursive_update"))
    ids = random_ids(0, 2, 9)
    cache = prefilled(model, ids)
    other = copy.deepcopy(cache)
    follow(model, cache, ids, random_ids(1, 2, 5))
    assert other.get_seq_length() == 9
    follow(model, other, ids, random_ids(2, 2, 5))


def test_a_foreign_cache_is_refused() -> None:
    model = make_model(small_config("fixed"))
    static = StaticCache(model.config, max_cache_len=8)
    with pytest.raises(ValueError, match="past_key_values is a StaticCache"):
        model(random_ids(0, 1, 3), past_key_values=static)


def test_training_and_labels_keep_no_cache() -> None:
    model = make_model(small_config("expert_choice"))
    ids = random_ids(0, 1, 5)
    assert model(ids, labels=ids).past_key_values is None
    assert model(ids, use_cache=False).past_key_values is None
    assert model.train()(ids).past_key_values is None
    assert model(ids, use_cache=True).past_key_values is not None


def test_a_sequence_past_the_maximum_is_refused() -> None:
    """Real tokens count, padding does not."""
    model = make_model(small_config("expert_choice", max_position_embeddings=12))
    message = "the sequence is 13 tokens long, past max_position_embeddings=12"
    with torch.no_grad():
        model(random_ids(0, 2, 12))
        with pytest.raises(ValueError, match=message):
            model(random_ids(0, 2, 13))
        with pytest.raises(ValueError, match=message):
            model(inputs_embeds=torch.randn(2, 13, 32))
        mask = torch.arange(20) >= torch.tensor([[8], [10]])
        cache = model(random_ids(0, 2, 20), attention_mask=mask).past_key_values
        longer = torch.cat((mask, torch.ones(2, 1).bool()), 1)
        with pytest.raises(ValueError, match=message):
            model(random_ids(0, 2, 1), attention_mask=longer, past_key_values=cache)
        longer[0, -1] = False
        model(random_ids(0, 2, 1), attention_mask=longer, past_key_values=cache)
        with pytest.raises(ValueError, match=message):
            model(random_ids(0, 2, 1), past_key_values=cache)
