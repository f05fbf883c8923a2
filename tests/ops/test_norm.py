"""RMSNorm against Transformers' Llama."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from mor.ops.norm import rms_norm


@given(
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    st.sampled_from([1e-6, 1e-5, 0.1]),
    st.floats(1e-3, 100.0),
    st.integers(0, 99),
)
def test_as_llama(dtype: torch.dtype, eps: float, size: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    hidden = (size * torch.randn(2, 5, 24, generator=generator)).to(dtype)
    llama = LlamaRMSNorm(24, eps).to(dtype)
    torch.nn.init.normal_(llama.weight, 1.0, 0.5)
    assert torch.equal(rms_norm(hidden, llama.weight, eps), llama(hidden))


def test_gradients_as_llama() -> None:
    hidden = torch.randn(2, 5, 24, requires_grad=True)
    llama = LlamaRMSNorm(24, 1e-5)
    torch.nn.init.normal_(llama.weight, 1.0, 0.5)
    inputs, direction = [hidden, llama.weight], torch.randn(2, 5, 24)
    one = torch.autograd.grad(rms_norm(hidden, llama.weight, 1e-5), inputs, direction)
    two = torch.autograd.grad(llama(hidden), inputs, direction)
    for a, b in zip(one, two, strict=True):
        assert_close(a, b)


def test_float64_stays_float64() -> None:
    hidden = torch.randn(3, 8, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda h, w: rms_norm(h, w, 1e-5), (hidden, weight))


def test_a_weight_for_each_token() -> None:
    hidden, weight = torch.randn(2, 5, 8), torch.randn(2, 5, 8)
    found = rms_norm(hidden, weight, 1e-5)
    for row in range(2):
        for place in range(5):
            alone = rms_norm(hidden[row, place], weight[row, place], 1e-5)
            assert_close(found[row, place], alone)


@pytest.mark.parametrize("size", [0.0, 1e-20])
def test_nothing_in_is_nothing_out(size: float) -> None:
    hidden = torch.full((2, 8), size, requires_grad=True)
    out = rms_norm(hidden, torch.ones(8), 1e-5)
    out.sum().backward()
    assert out.abs().max() < 1e-15
    assert hidden.grad is not None
    assert hidden.grad.isfinite().all()
