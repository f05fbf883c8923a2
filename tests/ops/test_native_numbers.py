"""Matrices per row, pointwise numbers and products of bytes in the kernels."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from mor.ops import native, pointwise
from mor.ops.native import PackedLinear, Workspace
from tests.ops.kernels import _threads, needs_kernels


@needs_kernels
@given(rows=st.integers(1, 9), inputs=st.integers(1, 70), outputs=st.integers(1, 3))
def test_a_matrix_of_its_own_for_each_row(rows: int, inputs: int, outputs: int) -> None:
    x, weight = torch.randn(rows, inputs), torch.randn(4, outputs, inputs)
    index = torch.randint(4, (rows,))
    for own in (index, index.sort().values, torch.zeros_like(index)):
        wanted = (weight[own].double() @ x[..., None].double())[..., 0]
        found = native.own_linear(x, weight, own)
        assert_close(found, wanted.float(), atol=1e-4, rtol=1e-4)
        alone = [native.own_linear(x[i : i + 1], weight, own[i : i + 1]) for i in range(rows)]
        assert torch.equal(found, torch.cat(alone))


PLAIN = {"sigmoid": torch.sigmoid, "tanh": torch.tanh, "silu": F.silu, "gelu": F.gelu}


@needs_kernels
@pytest.mark.parametrize("name", native.POINTWISE)
def test_a_number_alone_and_among_others(name: str) -> None:
    """Wherever it stands, however many there are, and near the plain form."""
    x = 4 * torch.randn(9000)
    found = native.pointwise(name, x)
    assert_close(found, PLAIN[name](x.double()).float(), atol=1e-6, rtol=1e-6)
    alone = torch.cat([native.pointwise(name, one) for one in x[:130].split(1)])
    assert torch.equal(found[:130], alone)
    for count in range(1, 131):
        assert torch.equal(native.pointwise(name, x[:count]), alone[:count])
        assert torch.equal(native.pointwise(name, x[130 - count : 130]), alone[-count:])
    with _threads(3):
        assert torch.equal(native.pointwise(name, x), found)
    turned = x[:120].view(10, 12).T
    assert torch.equal(native.pointwise(name, turned), found[:120].view(10, 12).T)


@needs_kernels
@pytest.mark.parametrize("name", native.POINTWISE)
def test_numbers_at_the_ends(name: str) -> None:
    x = torch.tensor([0.0, 1e-30, -1e-6, 90.0, -90.0, 300.0, -300.0, torch.inf, torch.nan])
    wanted = PLAIN[name](x.double()).float()
    if name == "gelu":
        wanted[-2] = torch.inf
    assert_close(native.pointwise(name, x), wanted, atol=1e-30, rtol=1e-6, equal_nan=True)
    assert native.pointwise(name, x[:0]).shape == (0,)


@pytest.mark.parametrize("name", native.POINTWISE)
def test_the_plain_form_where_gradients_are_wanted(name: str) -> None:
    x = torch.randn(5, 7, requires_grad=True)
    found = getattr(pointwise, name)(x)
    assert torch.equal(found, PLAIN[name](x))
    found.sum().backward()
    assert x.grad is not None
    with torch.no_grad():
        assert_close(getattr(pointwise, name)(x), found.detach(), atol=1e-6, rtol=1e-6)
        wide = x.double()
        assert torch.equal(getattr(pointwise, name)(wide), PLAIN[name](wide))


def bytes_form(x: Tensor, weight: Tensor) -> Tensor:
    """The plain form of a product of bytes: x [M, k] by weight [n, k], in float64."""
    scale = weight.abs().amax(1, keepdim=True).clamp(min=1e-30) / 127
    quantised = (weight / scale).round().double() * scale.double()
    groups = F.pad(x, (0, -x.shape[1] % native.GROUP)).unflatten(-1, (-1, native.GROUP))
    scale = groups.abs().amax(-1, keepdim=True).clamp(min=1e-30) / 127
    inputs = ((groups / scale).round().double() * scale.double()).flatten(1)[:, : x.shape[1]]
    return inputs @ quantised.T


@needs_kernels
@given(
    rows=st.integers(1, 20),
    inputs=st.integers(1, 200),
    outputs=st.integers(1, 120),
    bias=st.booleans(),
    threads=st.integers(1, 3),
)
def test_a_product_of_bytes(rows: int, inputs: int, outputs: int, bias: bool, threads: int) -> None:
    weight, x = torch.randn(outputs, inputs), torch.randn(rows, inputs)
    weight[0] = 0  # a column without a scale
    x[0] = 0
    added = torch.randn(outputs) if bias else None
    packed, work = PackedLinear([weight], [added], int8=True), Workspace()
    with _threads(threads):
        found = packed(x, work)
        alone = torch.cat([packed(row[None], work) for row in x])
    assert torch.equal(found, alone)
    wanted = bytes_form(x, weight) + (0 if added is None else added.double())
    # A number halfway between two bytes may go either way: a step of one product at most.
    assert_close(found, wanted.float(), atol=2e-3 * inputs**0.5, rtol=0)
    assert (found - wanted).abs().median() < 1e-4
