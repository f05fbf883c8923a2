"""Attention over pages row by row, and what other libraries document of theirs, on the CPU."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mor.ops.paged import Pages, Rows


def rows_case(
    seed: int,
    pieces: list[tuple[int, int]],
    *,
    heads: tuple[int, int] = (4, 2),
    width: int = 6,
    page_size: int = 4,
    dtype: torch.dtype = torch.float32,
    spread: bool = False,
) -> tuple[Tensor, Pages, Rows]:
    """Queries, pages and rows of (queries, places before them); what nobody owns is NaN.

    With ``spread`` a row's queries stand anywhere in it, ascending.
    """
    draw = torch.Generator().manual_seed(seed)
    lengths = [count + before for count, before in pieces]
    columns = max(-(-length // page_size) for length in lengths) + 2
    table = torch.randperm(len(pieces) * columns + 1, generator=draw)[:-1].view(-1, columns)
    shape = (len(pieces) * columns + 1, page_size, heads[1], width)
    keys, values = torch.full((2, *shape), torch.nan)
    used = []
    for row, (count, before) in enumerate(pieces):
        for place in range(lengths[row]):
            at = table[row, place // page_size], place % page_size
            keys[at], values[at] = torch.randn(2, *shape[2:], generator=draw)
        seen = torch.arange(before, before + count)
        if spread:
            seen = torch.randperm(lengths[row], generator=draw)[:count].sort().values
        used.append(seen + 1)
    counts = torch.tensor([0, *(count for count, _ in pieces)])
    starts, together = counts.cumsum(0).int(), torch.cat(used).int()
    query = torch.randn(len(together), heads[0], width, generator=draw).to(dtype)
    longest = max(count for count, _ in pieces)
    rows = Rows(table.int(), together, starts, longest, not spread)
    return query, Pages(keys.to(dtype), values.to(dtype)), rows


def entries_of(entries: Tensor, scales: Tensor | None) -> Tensor:
    """Numbers of the pool, in float32 or wider."""
    wide = entries.float() if entries.itemsize < 4 else entries
    return wide if scales is None else wide * scales[..., None]


def attend_row_by_row(query: Tensor, pages: Pages, rows: Rows) -> Tensor:
    """Every query alone over the places that it sees."""
    size = pages.keys.shape[1]
    flat = [
        entries_of(entries, scales).flatten(0, 1)
        for entries, scales in zip(pages[:2], pages[2:], strict=True)
    ]
    row = torch.bucketize(torch.arange(len(query)), rows.offsets[1:], right=True)
    out = torch.zeros(query.shape, dtype=flat[0].dtype)
    for number, used in enumerate(rows.used.tolist()):
        if used:
            places = torch.arange(used)
            slots = rows.table[row[number], places // size].long() * size + places % size
            seen = [one[slots].transpose(0, 1)[None] for one in flat]
            own = query[number, None, :, None].to(seen[0].dtype)
            out[number] = F.scaled_dot_product_attention(own, *seen, enable_gqa=True)[0, :, 0]
    return out


def varlen_contract(
    query: Tensor, key: Tensor, value: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor | None,
    max_q: int, max_k: int, *, scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1), enable_gqa: bool = False,
    seqused_k: Tensor | None = None, block_table: Tensor | None = None,
    num_splits: int | None = None,
) -> Tensor:  # fmt: skip
    """``varlen_attn`` over pages as its documentation has it; causal is aligned at the end."""
    assert cu_seq_k is None
    assert window_size == (-1, 0)
    assert num_splits == 1
    assert block_table is not None
    assert seqused_k is not None
    assert {block_table.dtype, seqused_k.dtype, cu_seq_q.dtype} == {torch.int32}
    assert block_table.stride(-1) == 1
    assert len(cu_seq_q) == len(block_table) + 1 == len(seqused_k) + 1
    assert enable_gqa or query.shape[1] == key.shape[2]
    assert max_k >= int(seqused_k.max())
    assert max_q >= int(cu_seq_q.diff().max())
    return _causal_rows(query, key, value, cu_seq_q, seqused_k.tolist(), block_table)


def _causal_rows(
    query: Tensor, key: Tensor, value: Tensor, starts: Tensor, lengths: list[int], table: Any
) -> Tensor:
    out, size = torch.zeros_like(query), key.shape[1]
    for row, length in enumerate(lengths):
        begin, end = starts[row : row + 2].tolist()
        if begin == end or not length:
            continue
        places = torch.arange(length)
        pages = torch.as_tensor(table[row]).long()
        seen = [
            one[pages[places // size], places % size].transpose(0, 1)[None] for one in (key, value)
        ]
        mask = torch.ones(end - begin, length).tril(length - (end - begin)).bool()
        own = query[begin:end].transpose(0, 1)[None]
        mixed = F.scaled_dot_product_attention(own, *seen, attn_mask=mask, enable_gqa=True)
        out[begin:end] = mixed[0].transpose(0, 1)
    return out


class WrapperContract:
    """``flashinfer.BatchPrefillWithPagedKVCacheWrapper`` with buffers, as documented."""

    def __init__(
        self, *, float_workspace_buffer: Tensor, kv_layout: str, use_cuda_graph: bool,
        qo_indptr_buf: Tensor, paged_kv_indptr_buf: Tensor, paged_kv_indices_buf: Tensor,
        paged_kv_last_page_len_buf: Tensor, backend: str,
    ) -> None:  # fmt: skip
        assert (kv_layout, use_cuda_graph, backend) == ("NHD", True, "fa2")
        assert float_workspace_buffer.dtype == torch.uint8
        self.starts, self.page_starts = qo_indptr_buf, paged_kv_indptr_buf
        self.pages, self.last = paged_kv_indices_buf, paged_kv_last_page_len_buf
        self.queries: int | None = None
        self.plans = 0

    def plan(
        self, *, qo_indptr: Tensor, paged_kv_indptr: Tensor, paged_kv_indices: Tensor,
        paged_kv_last_page_len: Tensor, num_qo_heads: int, num_kv_heads: int, head_dim_qk: int,
        page_size: int, causal: bool, sm_scale: float | None, q_data_type: torch.dtype,
        kv_data_type: torch.dtype, disable_split_kv: bool,
    ) -> None:  # fmt: skip
        assert causal
        assert disable_split_kv
        assert q_data_type == kv_data_type
        assert len(qo_indptr) == len(self.starts)  # the batch keeps its size
        total = int(qo_indptr[-1])
        self.queries = total if self.queries is None else self.queries
        assert total <= self.queries
        assert bool((paged_kv_last_page_len >= 1).all())
        assert bool((paged_kv_last_page_len <= page_size).all())
        assert len(paged_kv_indices) == int(paged_kv_indptr[-1])
        self.starts.copy_(qo_indptr)
        self.page_starts.copy_(paged_kv_indptr)
        self.last.copy_(paged_kv_last_page_len)
        self.pages[: len(paged_kv_indices)].copy_(paged_kv_indices.clone())
        self.shape = (num_qo_heads, num_kv_heads, head_dim_qk)
        self.size, self.total, self.plans = page_size, total, self.plans + 1

    def run(self, q: Tensor, paged_kv_cache: tuple[Tensor, Tensor]) -> Tensor:
        key, value = paged_kv_cache
        assert q.shape == (self.total, self.shape[0], self.shape[2])
        assert key.shape[1:] == (self.size, *self.shape[1:])
        bounds = self.page_starts.tolist()
        table = [self.pages[a:b] for a, b in pairwise(bounds)]
        full = self.page_starts.diff() - 1
        lengths = (full * self.size + self.last).tolist()
        return _causal_rows(q, key, value, self.starts, lengths, table)
