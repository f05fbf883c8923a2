"""What a forward takes: both names of the cache, nothing unknown, everything that is harmless."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from transformers import DataCollatorWithFlattening, DynamicCache, StaticCache
from transformers.generation.utils import ALL_CACHE_NAMES
from transformers.utils import TransformersKwargs

from mor import MoRCache, MorError, MoRForCausalLM
from mor.hf.arguments import CACHE_NAME, CACHE_NAMES, ArgumentError
from tests.strategies import KV_SHARING, ROUTERS, make_model, random_ids, small_config

IDS = random_ids(0, 2, 7)


@pytest.fixture(scope="module")
def model() -> MoRForCausalLM:
    return make_model(small_config("threshold"), 3)


def logits_of(model: MoRForCausalLM, *args: Any, **how: Any) -> Tensor:
    with torch.no_grad():
        return model(*args, **how).logits


# The cache by either name ---------------------------------------------------------------------


def test_the_name_is_the_one_that_generate_uses() -> None:
    assert CACHE_NAME in ALL_CACHE_NAMES
    assert sum(name in ALL_CACHE_NAMES for name in CACHE_NAMES) == 1


@pytest.mark.parametrize("name", CACHE_NAMES)
@pytest.mark.parametrize("kv_sharing", KV_SHARING)
@pytest.mark.parametrize("router", ROUTERS)
def test_either_name_is_the_cache(router: str, kv_sharing: str, name: str) -> None:
    model = make_model(small_config(router, kv_sharing), 3)
    cache = MoRCache(model.config)
    with torch.no_grad():
        model(IDS[:, :5], **{name: cache})
        assert cache.get_seq_length() == 5
        found = model(IDS[:, 5:], **{name: cache})
        wanted = model(IDS, use_cache=False, routing="causal").logits[:, 5:]
    assert_close(found.logits, wanted, atol=1e-5, rtol=1e-4)
    assert found.cache is cache
    assert found.past_key_values is cache
    assert found[CACHE_NAME] is cache
    assert cache.get_seq_length() == 7


@pytest.mark.parametrize("name", CACHE_NAMES)
@pytest.mark.filterwarnings("ignore:.past_key_values. is deprecated:FutureWarning")
def test_generate_goes_on_with_a_cache_by_either_name(name: str, model: MoRForCausalLM) -> None:
    cache = MoRCache(model.config)
    how = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    first = model.generate(IDS[:1], attention_mask=torch.ones(1, 7), **{name: cache}, **how)
    assert cache.get_seq_length() == 7 + 3
    longer = torch.cat((first, IDS[1:]), 1)
    mask = torch.ones_like(longer)
    found = model.generate(longer, attention_mask=mask, **{name: cache}, **how)
    wanted = model.generate(longer, attention_mask=mask, use_cache=False, **how)
    assert torch.equal(found, wanted)
    assert cache.get_seq_length() == 7 + 4 + 7 + 3


def test_two_caches_and_foreign_caches_are_refused(model: MoRForCausalLM) -> None:
    one, other = MoRCache(model.config), MoRCache(model.config)
    assert logits_of(model, IDS, cache=one, past_key_values=one).shape[:2] == (2, 7)
    with pytest.raises(ArgumentError, match="two names of one argument"):
        model(IDS, cache=one, past_key_values=other)
    for name in CACHE_NAMES:
        for foreign in (StaticCache(model.config, max_cache_len=8), DynamicCache(offloading=True)):
            with pytest.raises(ValueError, match=f"{name} is a .*Cache; .* use MoRCache"):
                model(IDS, **{name: foreign})


def test_a_cache_without_layer_objects_says_what_it_is(model: MoRForCausalLM) -> None:
    """Transformers asks ``all(cache.is_linear)``: of no layers at all that would be true."""
    cache = MoRCache(model.config)
    for filled in (False, True):
        if filled:
            logits_of(model, IDS, cache=cache)
        for flags in (cache.is_linear, cache.is_sliding, cache.is_dummy):
            assert flags == [False] * model.config.num_hidden_layers
        assert cache.batch_size == (2 if filled else -1)
        assert cache.get_mask_sizes(3, 0) == (7 * filled + 3, 0)


# Unknown and unsupported ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("max_dept", "max_depth"),
        ("attention_masks", "attention_mask"),
        ("past_key_value", "past_key_values"),
        ("num_logits_to_keep", "logits_to_keep"),
        ("output_router_trace", "output_router_traces"),
        ("label", "labels"),
        ("wibble", None),
    ],
)
@pytest.mark.parametrize("value", [1, None, False])
def test_an_unknown_argument_is_refused(
    name: str, near: str | None, value: Any, model: MoRForCausalLM
) -> None:
    with pytest.raises(ArgumentError) as caught:
        model(IDS, **{name: value})
    said = str(caught.value)
    assert said.startswith(f"MoRForCausalLM takes no argument {name!r}; ")
    assert (f"did you mean {near!r}?" in said) == (near is not None)
    assert all(known in said for known in ("attention_mask", "cache", "max_depth", "shift_labels"))
    assert isinstance(caught.value, (MorError, TypeError))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("output_attentions", True),
        ("output_router_logits", True),
        ("is_causal", False),
        ("head_mask", torch.ones(2, 4)),
        ("encoder_hidden_states", torch.ones(2, 7, 32)),
        ("token_type_ids", torch.ones(2, 7, dtype=torch.long)),
        ("cache_position", torch.arange(1, 8)),
        ("cache_position", torch.arange(6)),
        ("cu_seq_lens_k", torch.tensor([0, 7])),
        ("pixel_values", torch.ones(1)),
        ("cache_params", MoRCache),
    ],
)
def test_an_argument_that_would_matter_is_refused(
    name: str, value: Any, model: MoRForCausalLM
) -> None:
    with pytest.raises(ArgumentError, match=rf"^{name}=.* is not supported by MoRForCausalLM: "):
        model(IDS, **{name: value})
    if name != "cache_position":
        with pytest.raises(ArgumentError, match=f"^{name}="):
            model.base_model(IDS, **{name: value})


def test_arguments_that_change_nothing_go_through(model: MoRForCausalLM) -> None:
    wanted = logits_of(model, IDS)
    neutral: dict[str, Any] = {name: None for name in TransformersKwargs.__annotations__}
    neutral |= {"output_attentions": False, "output_router_logits": False, "is_causal": True}
    neutral |= {"token_type_ids": torch.zeros_like(IDS), "cache_position": torch.arange(7)}
    neutral |= {"head_mask": None, "encoder_hidden_states": None, "inputs_embeds": None}
    neutral |= {"return_dict": True, "use_cache": True, "labels": None, "max_length_q": 7}
    assert torch.equal(logits_of(model, IDS, **neutral), wanted)
    cache = MoRCache(model.config)
    logits_of(model, IDS[:, :4], cache=cache, cache_position=torch.arange(4))
    later = logits_of(model, IDS[:, 4:], cache=cache, cache_position=torch.arange(4, 7))
    assert_close(later, wanted[:, 4:], atol=1e-5, rtol=1e-4)


def test_generate_refuses_too(model: MoRForCausalLM) -> None:
    how = {"max_new_tokens": 2, "attention_mask": torch.ones_like(IDS), "pad_token_id": 0}
    with pytest.raises(ValueError, match="max_dept"):
        model.generate(IDS, max_dept=1, **how)
    with pytest.raises(ArgumentError, match=r"^output_attentions=True is not supported"):
        model.generate(IDS, output_attentions=True, return_dict_in_generate=True, **how)
    assert model.generate(IDS, output_attentions=False, **how).shape == (2, 9)


@pytest.mark.parametrize(
    "unfit", [{"labels": IDS}, {"use_cache": True}, {"output_hidden_states": True}, {"wibble": 1}]
)
def test_the_backbone_refuses_what_it_has_not(unfit: dict[str, Any], model: MoRForCausalLM) -> None:
    with pytest.raises(ArgumentError, match=next(iter(unfit))):
        model.base_model(IDS, **unfit)
    with torch.no_grad():
        plain = {"use_cache": False, "output_attentions": None, "past_key_values": None}
        states = model.base_model(IDS, **plain).last_hidden_state
        assert torch.equal(model.base_model(IDS, return_dict=False)[0], states)


# Understood though no parameters ---------------------------------------------------------------


@pytest.mark.parametrize("return_logits", [True, False])
def test_labels_that_are_shifted_already(return_logits: bool, model: MoRForCausalLM) -> None:
    shifted = torch.cat((IDS[:, 1:], torch.full((2, 1), -100)), 1)
    how = {"return_logits": return_logits}
    wanted = model(IDS, labels=IDS, **how)
    for labels in ({}, {"labels": IDS}):
        found = model(IDS, shift_labels=shifted, **labels, **how)
        assert torch.equal(found.loss, wanted.loss)
    assert not torch.equal(model(IDS, shift_labels=IDS).loss, wanted.loss)


@pytest.mark.parametrize("kind", ["return_seq_idx", "return_flash_attn_kwargs"])
def test_all_that_a_packing_collator_sends(kind: str, model: MoRForCausalLM) -> None:
    rows = [random_ids(i, length) for i, length in enumerate((5, 1, 7))]
    collate = DataCollatorWithFlattening(return_position_ids=False, **{kind: True})
    batch = collate([{"input_ids": row.tolist()} for row in rows])
    alone = torch.cat([logits_of(model, row[None], use_cache=False)[0] for row in rows])
    assert_close(logits_of(model, **batch)[0], alone, atol=1e-5, rtol=1e-4)
    batch.pop("labels")
    with torch.no_grad():
        states = model.base_model(**batch).last_hidden_state
        packed = model.get_output_embeddings()(states)[0]
    assert_close(packed, alone, atol=1e-5, rtol=1e-4)


def test_the_configuration_speaks_where_the_caller_does_not() -> None:
    config = small_config("fixed")
    config.output_hidden_states, config.return_dict = True, False
    model = make_model(config)
    with torch.no_grad():
        assert isinstance(model(IDS), tuple)
        assert model(IDS, return_dict=True).hidden_states is not None
        assert model(IDS, return_dict=True, output_hidden_states=False).hidden_states is None
