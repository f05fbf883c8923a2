"""Weights that bfloat16 holds exactly take half of the memory and give the bits of floats."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mor import MoRConfig, MoRForCausalLM
from mor.engine import Engine, SamplingParams
from mor.ops.native import PackedLinear, Workspace
from tests.ops.kernels import _threads, needs_kernels


def both(weights: list[Tensor], biases: list[Tensor | None], **more: bool) -> list[PackedLinear]:
    """Halves, and floats."""
    return [PackedLinear(weights, biases, halves=halves, **more) for halves in (True, False)]


@needs_kernels
@given(
    rows=st.integers(1, 90),
    inputs=st.integers(1, 70),
    outputs=st.integers(1, 110),
    bias=st.booleans(),
    paired=st.booleans(),
    threads=st.integers(1, 3),
)
def test_halves_give_the_bits_of_floats(
    rows: int, inputs: int, outputs: int, bias: bool, paired: bool, threads: int
) -> None:
    """Also where many tiles meet a panel, which is then made floats first; and a row alone."""
    weights = [torch.randn(outputs, inputs).bfloat16().float() for _ in range(2)]
    biases = [torch.randn(outputs) if bias else None for _ in range(2)]
    halves, floats = both(weights, biases, paired=paired)
    x, work = torch.randn(rows, inputs), Workspace()
    with _threads(threads):
        found = halves(x, work)
        assert torch.equal(found, floats(x, work))
        assert torch.equal(found[-1:], halves(x[-1:], work))
    if inputs % 2 == 0 and not bias:
        assert halves.nbytes * 2 == floats.nbytes


@needs_kernels
def test_numbers_at_the_ends_of_bfloat16() -> None:
    ends = [0.0, -0.0, 1e-40, -1e-40, 3.38e38, -3.38e38, torch.inf, 1.0]
    weight = torch.tensor(ends).bfloat16().float().repeat(3, 2)
    assert weight[0, 2] != 0  # below the smallest normal number
    halves, floats = both([weight], [None])
    assert halves.nbytes < floats.nbytes
    x, work = torch.randn(5, 16), Workspace()
    assert torch.equal(halves(x, work).nan_to_num(7), floats(x, work).nan_to_num(7))


@needs_kernels
@pytest.mark.parametrize("one", [1 + 2.0**-9, torch.nan])
def test_one_other_number_and_all_stay_floats(one: float) -> None:
    weight = torch.ones(7, 6)
    weight[3, 2] = one
    halves, floats = both([weight], [None])
    assert halves.nbytes == floats.nbytes
    x, work = torch.ones(2, 6), Workspace()
    assert torch.equal(halves(x, work).nan_to_num(7), floats(x, work).nan_to_num(7))


@needs_kernels
def test_a_model_writes_the_same_with_the_same_probabilities(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.manual_seed(0)
    config = MoRConfig(
        vocab_size=97, hidden_size=48, intermediate_size=80, num_attention_heads=3,
        num_recursions=3, num_recursion_layers=2, router="threshold", initializer_range=0.3,
    )  # fmt: skip
    model = MoRForCausalLM(config).eval().requires_grad_(False)
    for weight in model.parameters():
        weight.copy_(weight.bfloat16())
    prompts = [[5, 6, 7], [8] * 20, [9, 10]]
    params = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True, logprobs=3)

    def answers() -> list[object]:
        found = Engine(model).generate(prompts, params)
        return [(one.completions[0].token_ids, one.completions[0].logprobs) for one in found]

    told = answers()
    plain = PackedLinear.__init__
    monkeypatch.setattr(
        PackedLinear, "__init__", lambda *a, **k: plain(*a, **{**k, "halves": False})
    )
    assert answers() == told
