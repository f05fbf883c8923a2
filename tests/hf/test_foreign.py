"""Transformers' ``DynamicCache`` where ours is needed: its documented loops, and filled ones."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close
from transformers import DynamicCache, GenerationConfig, LlamaConfig, LlamaForCausalLM

from mor import MoRCache, MoRForCausalLM
from mor.hf.arguments import CACHE_NAME, ArgumentError
from mor.hf.convert.assemble import assemble, stack_plan
from mor.hf.convert.llama import llama_config
from tests.strategies import KV_SHARING, make_model, random_ids, small_config

IDS = random_ids(1, 2, 9)
HOW = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}


@pytest.fixture(scope="module")
def model() -> MoRForCausalLM:
    return make_model(small_config("threshold"))


@pytest.mark.parametrize("kv_sharing", KV_SHARING)
def test_a_loop_of_ones_own_fills_the_cache_that_it_made(kv_sharing: str) -> None:
    model = make_model(small_config("threshold", kv_sharing))
    cache = DynamicCache(config=model.config)
    found = []
    with torch.no_grad():
        for column in range(IDS.shape[1]):  # the result's cache is not looked at
            mask = torch.ones(2, column + 1, dtype=torch.long)
            step = IDS[:, column : column + 1]
            out = model(step, attention_mask=mask, past_key_values=cache, use_cache=True)
            found.append(out.logits)
        assert_close(torch.cat(found, 1), model(IDS).logits, atol=1e-4, rtol=1e-4)
    assert isinstance(cache, MoRCache)
    assert cache.get_seq_length() == IDS.shape[1]


def test_a_chat_keeps_one_cache_over_its_turns(model: MoRForCausalLM) -> None:
    cache, text = DynamicCache(), IDS
    for turn in range(3):
        text = torch.cat((text, random_ids(turn, 2, 3)), 1)
        mask = torch.ones_like(text)
        found = model.generate(text, attention_mask=mask, past_key_values=cache, **HOW)
        assert torch.equal(found, model.generate(text, attention_mask=mask, **HOW))
        assert cache.get_seq_length() == found.shape[1] - 1
        text = found


def test_one_prefix_serves_several_prompts(model: MoRForCausalLM) -> None:
    with torch.no_grad():
        prefix = model(IDS, past_key_values=DynamicCache(config=model.config)).past_key_values
    for seed in (3, 4):
        prompt = torch.cat((IDS, random_ids(seed, 2, 3)), 1)
        mask = torch.ones_like(prompt)
        mine = copy.deepcopy(prefix)
        found = model.generate(prompt, attention_mask=mask, past_key_values=mine, **HOW)
        assert torch.equal(found, model.generate(prompt, attention_mask=mask, **HOW))
    assert prefix.get_seq_length() == IDS.shape[1]


def test_dynamic_by_name_is_our_own(model: MoRForCausalLM) -> None:
    mask = torch.ones_like(IDS)
    wanted = model.generate(IDS, attention_mask=mask, **HOW)
    by_argument = model.generate(IDS, attention_mask=mask, cache_implementation="dynamic", **HOW)
    settings = GenerationConfig(cache_implementation="dynamic", **HOW)
    by_settings = model.generate(IDS, attention_mask=mask, generation_config=settings)
    assert torch.equal(wanted, by_argument)
    assert torch.equal(wanted, by_settings)


def test_entries_of_every_layer_are_what_llama_makes_of_them() -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=67,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
    )
    llama = LlamaForCausalLM(config).eval()
    ours = llama_config(config.to_dict(), "a test")
    model = assemble(ours, stack_plan(ours), llama.state_dict(), Path("test")).eval()
    entries = [(torch.randn(2, 2, 5, 8), torch.randn(2, 2, 5, 8)) for _ in range(4)]
    mask = torch.ones(2, 5 + IDS.shape[1], dtype=torch.long)
    with torch.no_grad():
        found, wanted = (
            kind(IDS, attention_mask=mask, **{CACHE_NAME: DynamicCache(entries)}).logits
            for kind in (model, llama)
        )
    assert_close(found, wanted, atol=1e-4, rtol=1e-4)


def test_entries_of_another_shape_are_refused(model: MoRForCausalLM) -> None:
    entries = [(torch.randn(2, 2, 5, 8), torch.randn(2, 2, 5, 8))]
    with pytest.raises(ValueError, match=r"holds 1 layers .* 5 unrolled layers of \[B, 2, n, 8\]"):
        model(IDS, past_key_values=DynamicCache(entries))


def test_continuous_batching_is_refused_at_once(model: MoRForCausalLM) -> None:
    calls = (
        model.generate_batch,
        model.init_continuous_batching,
        model.continuous_batching_context_manager,
    )
    for call in calls:
        with pytest.raises(ArgumentError, match="caches per depth; use generate"):
            call([[1, 2, 3]])
