"""Projection and loss a chunk at a time against logits that sit whole in memory."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from mor.ops.cross_entropy import (
    IGNORE,
    chunk_rows,
    factors_of,
    linear_cross_entropy,
    plain_cross_entropy,
)
from mor.ops.distillation import LiveRows, linear_distillation


def factors(seed: int, count: int, vocab: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(count, 6, generator=generator, dtype=dtype).requires_grad_()
    weight = torch.randn(vocab, 6, generator=generator, dtype=dtype).requires_grad_()
    targets = torch.randint(vocab, (count,), generator=generator)
    targets[torch.rand(count, generator=generator) < 0.2] = IGNORE
    return hidden, weight, targets


@given(
    st.integers(0, 2**20),
    st.integers(1, 23),
    st.integers(2, 17),
    st.integers(1, 9),
    st.floats(0, 3),
)
def test_chunks_add_up(seed: int, count: int, vocab: int, rows: int, scale: float) -> None:
    """Value and both gradients, whatever the chunk; -100 anywhere, all of them included."""
    hidden, weight, targets = factors(seed, count, vocab, torch.float64)
    found = linear_cross_entropy(hidden, weight, targets, rows)
    wanted = F.cross_entropy(
        F.linear(hidden, weight), targets, ignore_index=IGNORE, reduction="sum"
    )
    assert_close(found, wanted)
    one = torch.autograd.grad(found * scale, (hidden, weight))
    two = torch.autograd.grad(wanted * scale, (hidden, weight))
    for a, b in zip(one, two, strict=True):
        assert_close(a, b)


def test_only_what_is_asked_for() -> None:
    """No gradients are made where nobody wants them, and one where only one is wanted."""
    hidden, weight, targets = factors(1, 9, 5, torch.float64)
    wanted = plain_cross_entropy(hidden @ weight.t(), targets)
    assert not linear_cross_entropy(hidden.detach(), weight.detach(), targets, 4).requires_grad
    with torch.no_grad():
        assert_close(linear_cross_entropy(hidden, weight, targets, 4).float(), wanted)
        assert not any(one.requires_grad for one in factors_of(hidden, weight, targets))
    linear_cross_entropy(hidden.detach(), weight, targets, 4).backward()
    assert weight.grad is not None
    assert hidden.grad is None


def test_a_second_derivative_is_refused() -> None:
    """Gradients are made on the way forward: a graph of them would miss what they hang on."""
    hidden, weight, targets = factors(2, 9, 5, torch.float64)
    teacher = LiveRows(hidden.detach(), weight.detach())
    for loss in (
        linear_cross_entropy(hidden, weight, targets),
        linear_distillation(hidden, weight, targets, teacher, lm=1.0, kd=1.0)[0],
    ):
        (slope,) = torch.autograd.grad(loss.square(), hidden, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            (loss + slope.sum()).backward()


@pytest.mark.parametrize("count", [7, 12])
def test_one_target_for_each_token(count: int) -> None:
    hidden, weight, targets = factors(3, 9, 5, torch.float64)
    wrong, teacher = targets.repeat(2)[:count], LiveRows(hidden.detach(), weight.detach())
    with pytest.raises(ValueError, match=rf"{count},\) targets for 9 tokens"), torch.no_grad():
        linear_cross_entropy(hidden, weight, wrong, 9)
    with pytest.raises(ValueError, match="one for each token"):
        linear_distillation(hidden, weight, wrong, teacher, lm=1.0, kd=1.0)


def test_a_certain_and_a_hopeless_token_give_finite_numbers() -> None:
    hidden = torch.tensor([[200.0], [-200.0]], requires_grad=True)
    weight = torch.tensor([[1.0], [-1.0]], requires_grad=True)
    loss = linear_cross_entropy(hidden, weight, torch.tensor([0, 0]))
    loss.backward()
    assert_close(loss.detach(), torch.tensor(400.0))
    assert hidden.grad is not None
    assert_close(hidden.grad, torch.tensor([[0.0], [-2.0]]))


@pytest.mark.parametrize("autocast", [True, False])
def test_half_precision_multiplies_in_half_and_adds_in_full(autocast: bool) -> None:
    """bfloat16 by autocast over float32 weights, or by weights that are bfloat16 themselves."""
    dtype = torch.float32 if autocast else torch.bfloat16
    hidden, weight, targets = factors(2, 40, 11, dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = linear_cross_entropy(hidden, weight, targets, 16)
        plain = plain_cross_entropy(F.linear(hidden, weight), targets)
    assert loss.dtype == torch.float32
    assert_close(loss, plain, rtol=1e-3, atol=1e-3)
    one = torch.autograd.grad(loss, (hidden, weight))
    two = torch.autograd.grad(plain, (hidden, weight))
    for a, b in zip(one, two, strict=True):
        assert a.dtype == dtype
        assert_close(a, b, rtol=2e-2, atol=2e-2)


def test_a_chunk_holds_a_fraction_of_the_logits() -> None:
    assert chunk_rows(49_152, "cpu") * 49_152 * 4 < 2**26
    assert chunk_rows(4_096, "cpu") == 512
    assert chunk_rows(49_152, "cuda") > 2_000
