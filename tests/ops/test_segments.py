"""Attention over segments laid end to end: every form against one dense mask, both ways."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from mor.ops import attention
from mor.ops.attention import (
    SharedSegments,
    causal_attention,
    padded_segment_attention,
    prefix_attention,
    scattered_segment_attention,
    segment_attention,
    shared_segment_attention,
    slot_attention,
)
from mor.ops.prefix import PrefixAttention, Walk
from mor.ops.segments import Segments
from tests import dense

LENGTHS = st.lists(st.integers(1, 9), min_size=1, max_size=5)
HEADS = st.sampled_from([(1, 1), (4, 2), (3, 1)])
SEEDS = st.integers(0, 2**20)


def tokens(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=dtype).requires_grad_()


def both_ways(found: Tensor, wanted: Tensor, inputs: list[Tensor], **near: float) -> None:
    assert_close(found, wanted, **near)
    direction = torch.randn_like(wanted)
    one = torch.autograd.grad(found, inputs, direction)
    two = torch.autograd.grad(wanted, inputs, direction)
    for a, b in zip(one, two, strict=True):
        assert_close(a, b, **near)


def segments_of(lengths: list[int], names: list[int] | None = None) -> Segments:
    chosen = torch.tensor(range(len(lengths)) if names is None else names)
    return Segments.of(chosen.repeat_interleave(torch.tensor(lengths)))


@given(LENGTHS, SEEDS)
def test_segments_say_what_the_ids_say(lengths: list[int], seed: int) -> None:
    names = sorted(torch.randperm(20, generator=torch.Generator().manual_seed(seed)).tolist())
    segments = segments_of(lengths, names[: len(lengths)])
    assert segments.lengths == tuple(lengths)
    assert segments.names == tuple(names[: len(lengths)])
    assert segments.offsets.tolist() == [sum(lengths[:i]) for i in range(len(lengths) + 1)]
    values = tokens(seed, sum(lengths), 2).detach()
    padded = segments.pad(values)
    assert padded.shape[:2] == (len(lengths), max(lengths))
    assert torch.equal(segments.unpad(padded), values)
    for row, start, length in zip(padded, segments.starts, lengths, strict=True):
        assert torch.equal(row[:length], values[start : start + length])


@given(LENGTHS, HEADS, SEEDS)
@pytest.mark.parametrize("form", [segment_attention, padded_segment_attention])
def test_segments_are_causal_and_apart(
    form: object, lengths: list[int], heads: tuple, seed: int
) -> None:
    segments, (count, kv_count) = segments_of(lengths), heads
    inputs = [tokens(seed + i, sum(lengths), h, 4) for i, h in enumerate((count, *[kv_count] * 2))]
    found = form(*inputs, segments)  # type: ignore[operator]
    both_ways(found, dense.segment_attention(*inputs, segments), inputs)


@given(LENGTHS, HEADS, SEEDS, st.data())
def test_some_queries_over_the_keys_of_all(
    lengths: list[int], heads: tuple, seed: int, data: st.DataObject
) -> None:
    """Whole segments may have no query left."""
    total, (count, kv_count) = sum(lengths), heads
    places = torch.tensor(
        sorted(data.draw(st.sets(st.integers(0, total - 1), min_size=1), label="places"))
    )
    keys = segments_of(lengths)
    queries = Segments.of(dense.run_ids(keys)[places])
    inputs = [tokens(seed, len(places), count, 4)]
    inputs += [tokens(seed + i, total, kv_count, 4) for i in (1, 2)]
    shared = SharedSegments(places, queries, keys)
    for form in (shared_segment_attention, scattered_segment_attention):
        wanted = dense.shared_segment_attention(*inputs, shared)
        both_ways(form(*inputs, shared), wanted, inputs)


@pytest.mark.parametrize(("length", "queries"), [(300, 171), (129, 128), (70, 64), (5, 1)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_walk_over_chunks_equals_the_mask(length: int, queries: int, dtype: torch.dtype) -> None:
    """More than one chunk, rows whose slots differ, lengths that nothing divides."""
    slots = torch.stack([torch.randperm(length)[:queries].sort().values for _ in range(3)])
    inputs = [tokens(0, 3, 4, queries, 8, dtype=dtype)]
    inputs += [tokens(i, 3, 2, length, 8, dtype=dtype) for i in (1, 2)]
    near = {} if dtype == torch.float64 else {"atol": 2e-5, "rtol": 2e-5}
    wanted = slot_attention(*inputs, slots)
    walk = Walk(slots)
    both_ways(prefix_attention(*inputs, walk), wanted, inputs, **near)
    again = slot_attention(*inputs, slots)
    both_ways(prefix_attention(*inputs, walk), again, inputs, **near)  # the next layer's
    whole = tokens(3, 3, 4, length, 8, dtype=dtype)
    every = torch.arange(length).expand(3, -1)
    inputs[0] = whole
    both_ways(
        PrefixAttention.apply(*inputs, Walk(None)), slot_attention(*inputs, every), inputs, **near
    )
    both_ways(causal_attention(*inputs), slot_attention(*inputs, every), inputs, **near)


def test_the_walk_is_taken_in_training_and_not_without_gradients(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    taken = []

    class Noting:
        @staticmethod
        def apply(*inputs: Tensor) -> Tensor:
            taken.append(inputs[0].shape[2])
            return PrefixAttention.apply(*inputs)

    monkeypatch.setattr(attention, "PrefixAttention", Noting)
    inputs = [tokens(i, 1, 2, 130, 4) for i in range(3)]
    causal_attention(*inputs)
    with torch.no_grad():
        causal_attention(*inputs)
    causal_attention(*[t[:, :, :9] for t in inputs])
    assert taken == [130]


def test_half_precision_under_autocast() -> None:
    """Rotated queries come in float32, values in bfloat16: one kernel has to take both."""
    query, key = (tokens(i, 1, 4, 140, 8, dtype=torch.float32) for i in (0, 1))
    value = tokens(2, 1, 4, 140, 8, dtype=torch.float32).to(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        found = causal_attention(query, key, value)
        slots = torch.arange(0, 140, 2)[None]
        some = prefix_attention(query[:, :, ::2], key, value, Walk(slots))
    assert found.dtype == some.dtype == torch.bfloat16
    wanted = causal_attention(query.detach(), key.detach(), value.detach().float())
    assert_close(found.float(), wanted, atol=2e-2, rtol=2e-2)
    assert_close(some.float(), wanted[:, :, ::2], atol=2e-2, rtol=2e-2)
    found.float().sum().backward()
    assert query.grad is not None
    assert query.grad.isfinite().all()


@pytest.mark.parametrize("grouped", [True, False])
def test_what_the_kernel_for_unequal_lengths_is_told(
    monkeypatch: pytest.MonkeyPatch, grouped: bool
) -> None:
    """It runs on CUDA alone; here a stand-in reads the same arguments."""
    segments = segments_of([4, 1, 6])

    def kernel(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        cu_seq_q: Tensor,
        cu_seq_k: Tensor,
        max_q: int,
        max_k: int,
        *,
        window_size: tuple[int, int],
        **more: bool,
    ) -> Tensor:
        assert torch.equal(cu_seq_q, cu_seq_k)
        assert cu_seq_q.dtype == torch.int32
        assert (max_q, max_k, window_size) == (6, 6, (-1, 0))
        assert grouped or key.shape == query.shape
        assert more == ({"enable_gqa": True} if grouped else {})
        return dense.segment_attention(query, key, value, segments_of(cu_seq_q.diff().tolist()))

    parameters = dict.fromkeys(["enable_gqa"] if grouped else [])
    told = type("Signature", (), {"parameters": parameters})
    monkeypatch.setattr(attention, "signature", lambda _: told)
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", kernel)
    inputs = [tokens(i, 11, heads, 4) for i, heads in enumerate((4, 2, 2))]
    found = attention._varlen(*inputs, segments)
    both_ways(found, dense.segment_attention(*inputs, segments), inputs)
