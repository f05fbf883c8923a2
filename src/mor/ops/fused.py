"""What stands between the matrix products of a layer, each in one kernel of our own, in Triton.

For decoding on a GPU: a few tokens run through many small operators there, and each costs its
start. No gradients. The plain forms are :func:`mor.ops.norm.rms_norm`,
:func:`mor.ops.rope.rotate`, ``silu(gate) * up``, and two writes by index; results are rounded where
those round, but for the rotation, which is rounded once.

The module needs Triton; who imports it asks :func:`mor.ops.planned.explain_no_triton` first.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_STEP = 1024  # numbers that a program of the element-wise kernel takes


@triton.jit
def _norm(
    out: tl.tensor,
    hidden: tl.tensor,
    weight: tl.tensor,
    eps: tl.tensor,
    WIDTH: tl.constexpr,
    ROOM: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, ROOM)
    inside = at < WIDTH
    given = tl.load(hidden + row * WIDTH + at, mask=inside, other=0.0)
    wide = given.to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(wide * wide, 0) / WIDTH + eps)
    narrow = (wide * scale).to(given.dtype).to(tl.float32)
    own = tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * WIDTH + at, (own * narrow).to(given.dtype), mask=inside)


@triton.jit
def _rotate(
    query: tl.tensor,
    key: tl.tensor,
    heads: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    row_stride: tl.tensor,
    QUERIES: tl.constexpr,  # heads
    KEYS: tl.constexpr,
    HALF: tl.constexpr,  # of a head's width
    HEADS_ROOM: tl.constexpr,
    HALF_ROOM: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    head = tl.arange(0, HEADS_ROOM)[:, None]
    at = tl.arange(0, HALF_ROOM)[None, :]
    inside = (head < QUERIES + KEYS) & (at < HALF)
    turn = row * 2 * HALF + at
    narrow = at < HALF
    first_cos = tl.load(cos + turn, mask=narrow, other=0.0).to(tl.float32)
    first_sin = tl.load(sin + turn, mask=narrow, other=0.0).to(tl.float32)
    second_cos = tl.load(cos + turn + HALF, mask=narrow, other=0.0).to(tl.float32)
    second_sin = tl.load(sin + turn + HALF, mask=narrow, other=0.0).to(tl.float32)
    place = heads + row * row_stride + head * 2 * HALF + at
    first = tl.load(place, mask=inside, other=0.0)
    second = tl.load(place + HALF, mask=inside, other=0.0)
    dtype: tl.constexpr = first.dtype
    first, second = first.to(tl.float32), second.to(tl.float32)
    one = (first * first_cos - second * first_sin).to(dtype)
    two = (second * second_cos + first * second_sin).to(dtype)
    to = query + (row * QUERIES + head) * 2 * HALF + at
    tl.store(to, one, mask=inside & (head < QUERIES))
    tl.store(to + HALF, two, mask=inside & (head < QUERIES))
    to = key + (row * KEYS + head - QUERIES) * 2 * HALF + at
    tl.store(to, one, mask=inside & (head >= QUERIES))
    tl.store(to + HALF, two, mask=inside & (head >= QUERIES))


@triton.jit
def _silu_mul(out: tl.tensor, both: tl.tensor, WIDTH: tl.constexpr, STEP: tl.constexpr) -> None:
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * STEP + tl.arange(0, STEP)
    inside = at < WIDTH
    gate = tl.load(both + row * 2 * WIDTH + at, mask=inside, other=0.0)
    up = tl.load(both + row * 2 * WIDTH + WIDTH + at, mask=inside, other=0.0)
    wide = gate.to(tl.float32)
    active = (wide / (1.0 + tl.exp(-wide))).to(gate.dtype).to(tl.float32)
    tl.store(out + row * WIDTH + at, (active * up.to(tl.float32)).to(gate.dtype), mask=inside)


@triton.jit
def _write(
    keys: tl.tensor,
    values: tl.tensor,
    slots: tl.tensor,
    key: tl.tensor,
    value: tl.tensor,
    slot_stride: tl.tensor,
    key_stride: tl.tensor,
    value_stride: tl.tensor,
    WIDTH: tl.constexpr,
    ROOM: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, ROOM)
    inside = at < WIDTH
    slot = tl.load(slots + row * slot_stride).to(tl.int64)
    one = tl.load(key + row * key_stride + at, mask=inside)
    two = tl.load(value + row * value_stride + at, mask=inside)
    tl.store(keys + slot * WIDTH + at, one, mask=inside)
    tl.store(values + slot * WIDTH + at, two, mask=inside)


def fused_norm(hidden: Tensor, weight: Tensor, eps: float) -> Tensor:
    """:func:`~mor.ops.norm.rms_norm` of [N, D] with one weight [D], in ``hidden``'s type."""
    hidden = hidden.contiguous()
    count, width = hidden.shape
    out = torch.empty_like(hidden)
    _norm[(count,)](out, hidden, weight, eps, WIDTH=width, ROOM=triton.next_power_of_2(width))
    return out


def fused_rotate(
    heads: Tensor, cos: Tensor, sin: Tensor, queries: int, keys: int
) -> tuple[Tensor, Tensor]:
    """Query [N, H, d] and key [N, Hkv, d], turned by their positions.

    Args:
        heads: [N, (H + Hkv + ...) d] query heads, key heads, and what else stands behind them.
        cos, sin: [N, d].
        queries, keys: H and Hkv; Hkv may be 0.
    """
    count, width = cos.shape
    if heads.stride(1) != 1:
        heads = heads.contiguous()
    query = heads.new_empty((count, queries, width))
    key = heads.new_empty((count, keys, width))
    _rotate[(count,)](
        query, key, heads, cos.contiguous(), sin.contiguous(), heads.stride(0),
        QUERIES=queries, KEYS=keys, HALF=width // 2,
        HEADS_ROOM=triton.next_power_of_2(queries + keys),
        HALF_ROOM=triton.next_power_of_2(width // 2),
    )  # fmt: skip
    return query, key


def fused_silu_mul(both: Tensor) -> Tensor:
    """``silu(gate) * up`` [N, I] of both side by side, [N, 2 I]."""
    both = both.contiguous()
    count, width = both.shape[0], both.shape[1] // 2
    out = both.new_empty((count, width))
    step = min(_STEP, triton.next_power_of_2(width))
    _silu_mul[(count, triton.cdiv(width, step))](out, both, WIDTH=width, STEP=step)
    return out


def fused_write(keys: Tensor, values: Tensor, slots: Tensor, key: Tensor, value: Tensor) -> None:
    """Keep key and value [N, Hkv, d] at ``slots`` [N] of the pool's [slots, Hkv, d].

    All of one type. Heads of a token have to lie side by side, tokens may lie apart.
    """
    count, heads, width = key.shape
    key, value = (t if t[0].is_contiguous() else t.contiguous() for t in (key, value))
    _write[(count,)](
        keys, values, slots, key, value, slots.stride(0), key.stride(0), value.stride(0),
        WIDTH=heads * width, ROOM=triton.next_power_of_2(heads * width),
    )  # fmt: skip
