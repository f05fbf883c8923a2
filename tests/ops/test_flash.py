"""Attention in training: the kernel against plain forms in float64, and whom it leaves alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from mor.ops import attention, native
from mor.ops.attention import (
    SharedSegments,
    causal_attention,
    prefix_attention,
    segment_attention,
    shared_segment_attention,
    slot_attention,
)
from mor.ops.native import FlashAttention, Pieces
from mor.ops.prefix import Walk
from mor.ops.segments import Segments
from tests import dense

pytestmark = pytest.mark.skipif(native.library() is None, reason=native.missing())


def heads(*shape: int) -> Tensor:
    return torch.randn(shape, requires_grad=True)


def segments_of(lengths: list[int]) -> Segments:
    return Segments.of(torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths)))


def doubled(inputs: list[Tensor]) -> list[Tensor]:
    return [tensor.detach().double().requires_grad_() for tensor in inputs]


def assert_same(
    found: Tensor, inputs: list[Tensor], wanted: Tensor, wide: list[Tensor]
) -> tuple[Tensor, ...]:
    """float32 results and gradients lie within its rounding of those in float64."""
    assert type(found.grad_fn).__name__ != type(wanted.grad_fn).__name__
    near = {"atol": 1e-5, "rtol": 1e-5}
    assert_close(found.double(), wanted, **near)
    direction = torch.randn(found.shape)
    got = torch.autograd.grad(found, inputs, direction)
    for one, two in zip(got, torch.autograd.grad(wanted, wide, direction.double()), strict=True):
        assert_close(one.double(), two, **near)
    return got


@pytest.mark.parametrize(
    ("lengths", "count", "kv_count", "width"),
    [
        ([1], 1, 1, 16),
        ([5, 1, 7, 1], 3, 1, 32),
        ([97, 1, 143, 16, 48], 9, 3, 64),
        ([49, 96], 4, 2, 24),
        ([113], 2, 1, 80),
        ([30], 5, 5, 130),
        ([20, 9], 2, 2, 4),
    ],
)
def test_segments(lengths: list[int], count: int, kv_count: int, width: int) -> None:
    segments = segments_of(lengths)
    inputs = [heads(sum(lengths), h, width) for h in (count, kv_count, kv_count)]
    wide = doubled(inputs)
    found = segment_attention(*inputs, segments)
    assert "FlashAttention" in type(found.grad_fn).__name__
    assert_same(found, inputs, dense.segment_attention(*wide, segments), wide)


@pytest.mark.parametrize(("keys", "kept"), [([60, 1, 31, 150], 0.6), ([7, 130, 4], 0.1)])
def test_some_queries_over_the_keys_of_all(keys: list[int], kept: float) -> None:
    """Segments without a query among them; their keys get no gradient."""
    own = segments_of(keys)
    places = (torch.rand(sum(keys)) < kept).nonzero()[:, 0]
    places = places[dense.run_ids(own)[places] != 1]
    queries = Segments.of(dense.run_ids(own)[places])
    shared = SharedSegments(places, queries, own)
    inputs = [heads(len(places), 6, 32), heads(sum(keys), 2, 32), heads(sum(keys), 2, 32)]
    wide = doubled(inputs)
    found = shared_segment_attention(*inputs, shared)
    assert "FlashAttention" in type(found.grad_fn).__name__
    _, to_key, to_value = assert_same(
        found, inputs, dense.shared_segment_attention(*wide, shared), wide
    )
    unseen = dense.run_ids(own) == 1
    assert not to_key[unseen].any()
    assert not to_value[unseen].any()


@pytest.mark.parametrize("ascending", [True, False])
def test_rows_over_prefixes(ascending: bool) -> None:
    """Slots in any order; two queries may share one."""
    slots = torch.randint(210, (3, 101))
    slots = slots.sort(1).values if ascending else slots
    inputs = [heads(3, 4, 101, 32), heads(3, 2, 210, 32), heads(3, 2, 210, 32)]
    wide = doubled(inputs)
    found = prefix_attention(*inputs, Walk(slots))
    assert_same(found, inputs, slot_attention(*wide, slots), wide)


def test_a_long_row_is_several_jobs_whatever_the_threads() -> None:
    """More query rows than one job takes: sums of keys are made job by job. As large as real ones
    once: 9 heads of 64."""
    length = 700
    inputs = [heads(2, h, length, 64) for h in (9, 3, 3)]
    wide = doubled(inputs)
    slots = torch.arange(length).expand(2, -1)
    wanted = slot_attention(*wide, slots)
    found = causal_attention(*inputs)
    direction = torch.randn(found.shape)
    got = (found, *torch.autograd.grad(found, inputs, direction))
    right = (wanted, *torch.autograd.grad(wanted, wide, direction.double()))
    for one, two in zip(got, right, strict=True):
        assert_close(one.double(), two, atol=2e-5, rtol=2e-5)
    torch.set_num_threads(3)
    try:
        again = causal_attention(*inputs)
        assert torch.equal(found, again)
        for one, two in zip(got[1:], torch.autograd.grad(again, inputs, direction), strict=True):
            assert torch.equal(one, two)
    finally:
        torch.set_num_threads(1)


def test_no_bit_hangs_on_later_tokens_or_other_pieces() -> None:
    inputs = [heads(120, h, 32) for h in (4, 2, 2)]
    together = segment_attention(*inputs, segments_of([50, 70]))
    alone = segment_attention(*(t[50:] for t in inputs), segments_of([70]))
    fewer = segment_attention(*(t[50:81] for t in inputs), segments_of([31]))
    assert torch.equal(together[50:], alone)
    assert torch.equal(alone[:31], fewer)
    one = torch.autograd.grad(together[50:].sum(), inputs)
    two = torch.autograd.grad(alone.sum(), inputs)
    for a, b in zip(one, two, strict=True):
        assert torch.equal(a, b)


def test_great_scores_and_what_is_no_number() -> None:
    """Scores of thousands neither overflow nor vanish; nan stays with the rows that see it."""
    query, key, value = (heads(40, 2, 16) for _ in range(3))
    loud = [query.detach() * 100, key.detach() * 100, value.detach()]
    loud = [t.requires_grad_() for t in loud]
    wide = doubled(loud)
    found = segment_attention(*loud, segments_of([40]))
    wanted = dense.segment_attention(*wide, segments_of([40]))
    assert_close(found.double(), wanted, atol=1e-2, rtol=1e-2)
    broken = query.detach().clone()
    broken[7] = torch.nan
    out = FlashAttention.apply(broken, key, value, Pieces([(0, 40, 0, 40)]))
    assert out[7].isnan().all()
    assert out[torch.arange(40) != 7].isfinite().all()


def test_it_is_taken_where_gradients_of_float32_are_wanted_and_nowhere_else(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    taken = []

    class Noting:
        @staticmethod
        def apply(*inputs: object) -> Tensor:
            taken.append(len(inputs))
            return FlashAttention.apply(*inputs)

    monkeypatch.setattr(attention.native, "FlashAttention", Noting)
    inputs = [heads(1, 2, 9, 16) for _ in range(3)]
    causal_attention(*inputs)
    assert len(taken) == 1
    with torch.no_grad():
        causal_attention(*inputs)
    causal_attention(*(t.double() for t in inputs))
    causal_attention(*(t.detach() for t in inputs))
    with torch.autocast("cpu", torch.bfloat16):
        causal_attention(*inputs)
    assert len(taken) == 1


def test_a_second_derivative_is_refused() -> None:
    inputs = [heads(5, 2, 16) for _ in range(3)]
    found = FlashAttention.apply(*inputs, Pieces([(0, 5, 0, 5)]))
    (grad,) = torch.autograd.grad(found.square().sum(), inputs[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()
