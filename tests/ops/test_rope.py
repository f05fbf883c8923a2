"""Rotary positions against Transformers' Llama, for every static rope type."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from mor import ConfigError, MoRConfig
from mor.ops.rope import inverse_frequencies, rotate, rotation

TYPES: dict[str, dict[str, Any]] = {
    "default": {"rope_theta": 10000.0},
    "large theta": {"rope_type": "default", "rope_theta": 5e5},
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 5e5,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "yarn": {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 64,
    },
}
FIELDS: dict[str, Any] = {
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", TYPES)
def test_as_llama(name: str, dtype: torch.dtype) -> None:
    ours = MoRConfig(**FIELDS, rope_parameters=dict(TYPES[name]))
    llama = LlamaConfig(**FIELDS, rope_parameters={"rope_type": "default"} | TYPES[name])
    positions = torch.randint(256, (3, 20))
    query, key = torch.randn(3, 4, 20, 16).to(dtype), torch.randn(3, 2, 20, 16).to(dtype)
    cos, sin = LlamaRotaryEmbedding(llama)(query, positions)
    frequencies, scale = inverse_frequencies(ours)
    rope = rotation(positions, frequencies, scale, dtype)
    assert_close(rope[0], cos)
    assert_close(rope[1], sin)
    wanted = apply_rotary_pos_emb(query, key, cos, sin)
    assert_close(rotate(query, rope), wanted[0])
    assert_close(rotate(key, rope), wanted[1])
    if name == "yarn":
        assert scale > 1


def test_the_types_are_not_all_the_same() -> None:
    found = []
    for parameters in TYPES.values():
        config = MoRConfig(**FIELDS, rope_parameters=dict(parameters))
        found.append(inverse_frequencies(config)[0])
    for one in range(len(found)):
        for two in range(one):
            assert not torch.allclose(found[one], found[two])


@given(st.integers(0, 500), st.integers(0, 500), st.integers(0, 500), st.integers(0, 99))
def test_only_distances_matter(query_at: int, key_at: int, shift: int, seed: int) -> None:
    """<R_m q, R_n k> depends on m - n, and lengths are kept."""
    generator = torch.Generator().manual_seed(seed)
    query, key = torch.randn(2, 1, 1, 1, 16, generator=generator, dtype=torch.float64)
    frequencies, scale = inverse_frequencies(MoRConfig(**FIELDS))

    def product(one: int, two: int) -> torch.Tensor:
        turned = [
            rotate(heads, rotation(torch.tensor([[at]]), frequencies, scale, torch.float64))
            for heads, at in ((query, one), (key, two))
        ]
        assert_close(turned[0].norm(), query.norm(), atol=1e-5, rtol=0)
        return (turned[0] * turned[1]).sum()

    near = product(query_at, key_at)
    assert_close(product(query_at + shift, key_at + shift), near, atol=5e-3, rtol=0)
    assert_close(product(0, 0), (query * key).sum(), atol=1e-9, rtol=0)


@pytest.mark.parametrize(
    ("kind", "more"),
    [
        ("dynamic", {"factor": 2.0}),
        ("longrope", {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8, "factor": 2.0}),
        ("no such type", {}),
    ],
)
def test_types_that_change_with_the_text_are_refused(kind: str, more: dict[str, Any]) -> None:
    parameters = {"rope_type": kind, "rope_theta": 10000.0} | more
    with pytest.raises(ConfigError, match=rf"\['rope_type'\]='{kind}' is not supported"):
        MoRConfig(**FIELDS, rope_parameters=parameters)
