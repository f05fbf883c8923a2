"""With one recursion and no routing the network is Llama: the same weights, the same numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from mor import MoRForCausalLM
from mor.hf.convert.assemble import assemble, stack_plan
from mor.hf.convert.llama import llama_config

VOCAB = 83
ROPES: list[dict[str, Any]] = [
    {"rope_type": "default", "rope_theta": 10000.0},
    {"rope_type": "default", "rope_theta": 500000.0},
    {"rope_type": "linear", "rope_theta": 10000.0, "factor": 3.0},
    {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
    {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 16,
    },
]


@st.composite
def llamas(draw: st.DrawFn) -> LlamaForCausalLM:
    """Random Llamas: multi-head, grouped and single KV heads, 1 to 4 layers, any static RoPE."""
    kv_heads, groups = draw(st.sampled_from([(1, 1), (1, 4), (2, 2), (4, 1), (3, 1)]))
    head_dim = draw(st.sampled_from([2, 8, 16]))
    heads = kv_heads * groups
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=heads * draw(st.sampled_from([4, 12])),
        head_dim=head_dim,
        intermediate_size=draw(st.sampled_from([7, 32])),
        num_hidden_layers=draw(st.integers(1, 4)),
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=64,
        rms_norm_eps=draw(st.sampled_from([1e-6, 1e-5])),
        tie_word_embeddings=draw(st.booleans()),
        rope_parameters=dict(draw(st.sampled_from(ROPES))),
        initializer_range=0.2,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=draw(st.sampled_from([None, 0])),
    )
    torch.manual_seed(draw(st.integers(0, 2**16)))
    model = LlamaForCausalLM(config)
    for name, parameter in model.named_parameters():
        if "norm" in name:  # Ones would hide a norm that is left out or swapped.
            torch.nn.init.normal_(parameter, 1.0, 0.3)
    return model


def ours(llama: LlamaForCausalLM) -> MoRForCausalLM:
    config = llama_config(llama.config.to_dict(), "test")
    assert config.num_recursions == 1
    assert not config.is_routed
    return assemble(config, stack_plan(config), llama.state_dict(), Path("test"))


@st.composite
def ids(draw: st.DrawFn) -> Tensor:
    """Token ids [1..3, 2..27], of odd and even lengths."""
    random = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    shape = (draw(st.integers(1, 3)), draw(st.integers(2, 27)))
    return torch.randint(1, VOCAB, shape, generator=random)


@given(llama=llamas(), input_ids=ids())
def test_logits_loss_and_gradients(llama: LlamaForCausalLM, input_ids: Tensor) -> None:
    model = ours(llama)
    expected = llama(input_ids, labels=input_ids, use_cache=False)
    found = model(input_ids, labels=input_ids)
    torch.testing.assert_close(found.logits, expected.logits, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.loss, expected.loss, rtol=1e-5, atol=1e-6)
    expected.loss.backward()
    found.loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    theirs = {name: p.grad for name, p in llama.named_parameters()}
    plan = stack_plan(model.config)
    assert {name for names in plan.values() for name in names} == set(theirs)
    for (name, _), (source,) in plan.items():
        torch.testing.assert_close(gradients[name], theirs[source], rtol=1e-3, atol=1e-5)


@given(llama=llamas(), input_ids=ids())
def test_greedy_generation(llama: LlamaForCausalLM, input_ids: Tensor) -> None:
    model, llama = ours(llama).eval(), llama.eval()
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    mask = torch.ones_like(input_ids)
    expected = llama.generate(input_ids, attention_mask=mask, **options)
    assert torch.equal(model.generate(input_ids, attention_mask=mask, **options), expected)


@given(llama=llamas(), input_ids=ids(), dtype=st.sampled_from([torch.bfloat16, torch.float64]))
def test_other_dtypes(llama: LlamaForCausalLM, input_ids: Tensor, dtype: torch.dtype) -> None:
    for parameter in llama.eval().parameters():
        parameter.data = parameter.data.to(dtype)  # Not .to(): rotary frequencies stay float32.
    with torch.no_grad():
        found, expected = ours(llama).eval()(input_ids).logits, llama(input_ids).logits
    assert found.dtype == dtype
    tolerance = 1e-5 if dtype == torch.float64 else 0.1
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
