"""Attention over pages as a kernel of our own, in Triton: the form for any GPU.

A program takes a tile of one row's queries, for all query heads of one head of keys and values,
and walks over the row's pages in steps of a fixed number of places. Steps and tiles do not hang on
the other rows, so batch mates move no bit. How many tiles a row has is on the device alone: the
grid has room for one more tile per row than full tiles, and each program finds its row.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mor.ops.paged.rows import Pages, Rows

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# How entries are read: numbers, bytes, or bytes that are float8_e4m3fn.
_NUMBERS, _BYTES, _EIGHT_BIT_FLOATS = 0, 1, 2


@triton.jit
def _load(
    entries: tl.tensor, at: tl.tensor, inside: tl.tensor, dtype: tl.constexpr, kind: tl.constexpr
) -> tl.tensor:
    """Entries as ``dtype``; bytes of all 256 values are exact in each of them."""
    found = tl.load(entries + at, mask=inside, other=0)
    if kind == 2:
        # e4m3 has the exponent and mantissa of a half-precision number that is 256 times smaller.
        # By hand, since GPUs before 8.9 know no such type.
        bits = found.to(tl.int16)
        half = ((bits & 0x80) << 8) | ((bits & 0x7F) << 7)
        return (half.to(tl.float16, bitcast=True).to(tl.float32) * 256.0).to(dtype)
    if kind == 1:
        return found.to(tl.float32).to(dtype)
    return found.to(dtype)


@triton.jit
def _dot(left: tl.tensor, right: tl.tensor, wide: tl.constexpr) -> tl.tensor:
    if wide:
        return tl.dot(left.to(tl.float32), right.to(tl.float32), input_precision="ieee")
    return tl.dot(left, right, input_precision="ieee")


@triton.jit(do_not_specialize=["rows"])
def _attend(
    out: tl.tensor,
    query: tl.tensor,
    keys: tl.tensor,
    values: tl.tensor,
    key_scales: tl.tensor,
    value_scales: tl.tensor,
    table: tl.tensor,
    used: tl.tensor,
    starts: tl.tensor,
    scale: tl.tensor,
    rows: tl.tensor,
    query_stride: tl.tensor,
    head_stride: tl.tensor,
    table_stride: tl.tensor,
    RAGGED: tl.constexpr,  # whether a row may have several queries
    SEARCH: tl.constexpr,  # steps that find a row among all of them
    KIND: tl.constexpr,
    PAGE: tl.constexpr,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,  # query heads of one head of keys and values
    GROUP_ROOM: tl.constexpr,  # the next power of two
    WIDTH: tl.constexpr,
    WIDTH_ROOM: tl.constexpr,
    QUERIES: tl.constexpr,  # of a tile
    PLACES: tl.constexpr,  # of a step
    WIDE: tl.constexpr,  # products in float32, whatever the queries are
) -> None:
    tile = tl.program_id(0)
    kv_head = tl.program_id(1)
    row = tile
    first = tile
    end = tile + 1
    if RAGGED:
        # Row s has the tiles from starts[s] // QUERIES + s on: as many as it can need, and at most
        # one that stays empty.
        low = tile * 0
        high = low + rows - 1
        for _ in tl.static_range(SEARCH):
            middle = (low + high + 1) // 2
            before = tl.load(starts + middle) // QUERIES + middle <= tile
            low = tl.where(before, middle, low)
            high = tl.where(before, high, middle - 1)
        row = low
        begin = tl.load(starts + row)
        end = tl.load(starts + row + 1)
        first = begin + (tile - begin // QUERIES - row) * QUERIES
    lanes = tl.arange(0, QUERIES * GROUP_ROOM)
    at = first + lanes // GROUP_ROOM
    head = kv_head * GROUP + lanes % GROUP_ROOM
    real = (at < end) & (lanes % GROUP_ROOM < GROUP)
    reach = tl.load(used + at, mask=real, other=0)
    longest = tl.max(reach, 0)

    inner = tl.arange(0, WIDTH_ROOM)
    narrow = inner < WIDTH
    at = at.to(tl.int64)
    asked = tl.load(
        query + at[:, None] * query_stride + head[:, None] * head_stride + inner[None, :],
        mask=real[:, None] & narrow[None, :],
        other=0.0,
    )
    dtype: tl.constexpr = asked.dtype
    top = tl.full([QUERIES * GROUP_ROOM], float("-inf"), tl.float32)
    total = tl.zeros([QUERIES * GROUP_ROOM], tl.float32)
    mixed = tl.zeros([QUERIES * GROUP_ROOM, WIDTH_ROOM], tl.float32)
    for step in range(0, longest, PLACES):
        places = step + tl.arange(0, PLACES)
        there = places < longest
        page = tl.load(table + row * table_stride + places // PAGE, mask=there, other=0)
        entry = (page.to(tl.int64) * PAGE + places % PAGE) * KV_HEADS + kv_head
        where = entry[:, None] * WIDTH + inner[None, :]
        inside = there[:, None] & narrow[None, :]
        key = _load(keys, where, inside, dtype, KIND)
        score = _dot(asked, tl.trans(key), WIDE) * scale
        if KIND > 0:
            score *= tl.load(key_scales + entry, mask=there, other=0.0)[None, :]
        score = tl.where(places[None, :] < reach[:, None], score, float("-inf"))
        now = tl.maximum(top, tl.max(score, 1))
        level = tl.where(now == float("-inf"), 0.0, now)  # a query that has seen nothing so far
        weight = tl.exp(score - level[:, None])
        keep = tl.exp(top - level)
        total = total * keep + tl.sum(weight, 1)
        if KIND > 0:
            weight *= tl.load(value_scales + entry, mask=there, other=0.0)[None, :]
        value = _load(values, where, inside, dtype, KIND)
        fresh = _dot(weight.to(dtype), value, WIDE)
        mixed = mixed * keep[:, None] + fresh
        top = now
    mixed = mixed / tl.where(total > 0, total, 1.0)[:, None]
    to = (at[:, None] * (KV_HEADS * GROUP) + head[:, None]) * WIDTH + inner[None, :]
    tl.store(out + to, mixed.to(dtype), mask=real[:, None] & narrow[None, :])


def kernel_sizes(
    group: int, width: int, longest: int, wide: bool
) -> tuple[dict[str, int], dict[str, int]]:
    """Sizes of a tile and of a step, and what the compiler needs; by shapes alone.

    Tensor cores multiply at least 16 by 16 by 16, so a tile has 16 lanes or more.

    Args:
        group: query heads of one head of keys and values.
        width: of a head.
        longest: most queries of a row.
        wide: whether numbers have 32 bits.
    """
    group_room = triton.next_power_of_2(group)
    lanes = 16 if longest == 1 else min(64, max(16, triton.next_power_of_2(longest * group_room)))
    width_room = max(16, triton.next_power_of_2(width))
    sizes = {
        "GROUP_ROOM": group_room,
        "WIDTH_ROOM": width_room,
        "QUERIES": max(1, lanes // group_room),
        "PLACES": 32 if wide or width_room > 128 else 64,
    }
    return sizes, {"num_warps": 4, "num_stages": 2}


def triton_attention(query: Tensor, pages: Pages, rows: Rows, scale: float | None = None) -> Tensor:
    """See :data:`~mor.ops.paged.rows.PagesAttention`; bfloat16, float16 and float32.

    Entries may be of any of these types, or bytes with scales. Sums are in float32.
    """
    count, heads, width = query.shape
    (_, size, kv_heads, _), group = pages.keys.shape, heads // pages.keys.shape[2]
    if query.stride(2) != 1:
        query = query.contiguous()
    kinds = {torch.int8: _BYTES, torch.float8_e4m3fn: _EIGHT_BIT_FLOATS}
    kind = kinds.get(pages.keys.dtype, _NUMBERS)
    keys, values = pages.keys, pages.values
    if kind == _EIGHT_BIT_FLOATS:
        keys, values = keys.view(torch.uint8), values.view(torch.uint8)
    wide = query.dtype == torch.float32
    sizes, options = kernel_sizes(group, width, rows.longest, wide)
    ragged = rows.starts is not None
    tiles = len(rows.table)
    if ragged:
        tiles += count // sizes["QUERIES"]
    # Rows of one query each are all written; where rows are ragged, some queries may be in none.
    make = torch.zeros if ragged else torch.empty
    out = make((count, heads, width), dtype=query.dtype, device=query.device)
    # Where there are no scales and no starts the kernel reads none: it needs any pointer.
    _attend[(tiles, kv_heads)](
        out, query, keys, values,
        out if pages.key_scales is None else pages.key_scales,
        out if pages.value_scales is None else pages.value_scales,
        rows.table, rows.used, rows.used if rows.starts is None else rows.starts,
        width**-0.5 if scale is None else scale,
        len(rows.table), query.stride(0), query.stride(1), rows.table.stride(0),
        RAGGED=ragged, SEARCH=max(0, len(rows.table) - 1).bit_length(), KIND=kind, PAGE=size,
        KV_HEADS=kv_heads, GROUP=group, WIDTH=width,
        WIDE=query.device.type == "cpu",  # Triton's interpreter multiplies the bits of bfloat16
        **sizes, **options,
    )  # fmt: skip
    return out
