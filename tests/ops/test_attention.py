"""Attention without masks against attention spelled out, forward and backward, odd lengths."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from mor.ops.attention import causal_attention, scattered_attention, slot_attention

SHAPES = st.tuples(
    st.integers(1, 3), st.sampled_from([(1, 1), (4, 4), (4, 2), (3, 1)]), st.sampled_from([2, 6])
)
SEEDS = st.integers(0, 2**20)


def heads(seed: int, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()


def spelled_out(query: Tensor, key: Tensor, value: Tensor, slots: Tensor) -> Tensor:
    """One query at a time over the keys up to its slot."""
    groups = query.shape[1] // key.shape[1]
    rows = []
    for row, row_slots in enumerate(slots.tolist()):
        for head in range(query.shape[1]):
            k, v = key[row, head // groups], value[row, head // groups]
            for place, slot in enumerate(row_slots):
                scores = k[: slot + 1] @ query[row, head, place] / query.shape[-1] ** 0.5
                rows.append(scores.softmax(0) @ v[: slot + 1])
    return torch.stack(rows).view(query.shape)


def both_ways(found: Tensor, wanted: Tensor, inputs: list[Tensor], seed: int) -> None:
    assert_close(found, wanted)
    direction = heads(seed + 9, *wanted.shape).detach()
    one = torch.autograd.grad(found, inputs, direction)
    two = torch.autograd.grad(wanted, inputs, direction, retain_graph=True)
    for a, b in zip(one, two, strict=True):
        assert_close(a, b)


@given(SHAPES, st.integers(1, 19), SEEDS)
def test_causal_attention(shape: tuple, length: int, seed: int) -> None:
    batch, (count, kv_count), width = shape
    query = heads(seed, batch, count, length, width)
    key, value = (heads(seed + i, batch, kv_count, length, width) for i in (1, 2))
    slots = torch.arange(length).expand(batch, -1)
    wanted = spelled_out(query, key, value, slots)
    both_ways(causal_attention(query, key, value), wanted, [query, key, value], seed)


@given(SHAPES, st.integers(1, 19), SEEDS, st.data())
def test_queries_at_any_slots(shape: tuple, length: int, seed: int, data: st.DataObject) -> None:
    """Masked and scattered, in any order; scattered queries need slots of their own."""
    batch, (count, kv_count), width = shape
    queries = data.draw(st.integers(1, length))
    generator = torch.Generator().manual_seed(seed)
    slots = torch.stack(
        [torch.randperm(length, generator=generator)[:queries] for _ in range(batch)]
    )
    query = heads(seed, batch, count, queries, width)
    key, value = (heads(seed + i, batch, kv_count, length, width) for i in (1, 2))
    wanted = spelled_out(query, key, value, slots)
    for form in (slot_attention, scattered_attention):
        both_ways(form(query, key, value, slots), wanted, [query, key, value], seed)


@given(st.integers(1, 17), st.integers(0, 5), SEEDS)
def test_masked_queries_may_share_a_slot(length: int, more: int, seed: int) -> None:
    query = heads(seed, 2, 2, length + more, 4)
    key, value = heads(seed + 1, 2, 1, length, 4), heads(seed + 2, 2, 1, length, 4)
    slots = torch.randint(length, (2, length + more), generator=torch.Generator().manual_seed(seed))
    wanted = spelled_out(query, key, value, slots)
    both_ways(slot_attention(query, key, value, slots), wanted, [query, key, value], seed)


@pytest.mark.parametrize("real", [1, 4, 7])
def test_what_follows_the_real_tokens_is_never_seen(real: int) -> None:
    query, key, value = (heads(i, 2, 2, 9, 4).detach() for i in range(3))
    before = causal_attention(query, key, value)[:, :, :real]
    slots = torch.arange(9).expand(2, -1)
    for part in (query, key, value):
        part[:, :, real:] = 1e4
    assert torch.equal(causal_attention(query, key, value)[:, :, :real], before)
    assert_close(slot_attention(query, key, value, slots)[:, :, :real], before)
