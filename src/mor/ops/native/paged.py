"""Attention over pages, and whole stages over them."""

from __future__ import annotations

from ctypes import POINTER, byref, pointer

import torch
from torch import Tensor

from mor.ops.native.calls import (
    ENTRY_TYPES,
    LayerStruct,
    PagesStruct,
    RaggedStruct,
    Workspace,
    at,
    kernels,
    shape,
)
from mor.ops.native.packed import PackedLayer


class Ragged:
    """Tokens of a batch, laid end to end in pieces, each over one row of a page table.

    Args:
        keys, values: the pool, [pages x page_size, Hkv, d].
        table: [rows, layers, columns] pages.
        page_size: tokens per page.
        own_rows, written: [N] table row and place that each token is written to.
        slots: [N] last place of its row that each token sees; ascending within a piece.
        rows, counts: [S] table row that each piece reads, and its number of tokens.
        scales: of keys and values of bytes, [pages x page_size, Hkv] each.
        mixed: where rows are read with entries of another row in place of some: that row and its
            length, [S] each, and [rows, width] which place each of its entries takes.
    """

    def __init__(
        self,
        keys: Tensor,
        values: Tensor,
        table: Tensor,
        page_size: int,
        own_rows: Tensor,
        written: Tensor,
        slots: Tensor,
        rows: Tensor,
        counts: Tensor,
        scales: tuple[Tensor, Tensor] | None = None,
        mixed: tuple[Tensor, Tensor, Tensor] | None = None,
    ) -> None:
        columns = (own_rows, written, slots, rows, counts)
        self._kept = (keys, values, table, scales, columns, mixed)
        pages = PagesStruct(
            keys.data_ptr(), values.data_ptr(), *map(at, scales or (None, None)),
            table.data_ptr(), ENTRY_TYPES.index(keys.dtype), page_size, *keys.shape[1:],
            *table.shape[1:],
        )  # fmt: skip
        self.struct = RaggedStruct(
            pages, *(column.data_ptr() for column in columns), rows.shape[0],
            *map(at, mixed or (None, None, None)), mixed[2].shape[1] if mixed else 0,
        )  # fmt: skip


def paged_attention(
    query: Tensor, key: Tensor | None, value: Tensor | None, batch: Ragged, layer: int
) -> Tensor:
    """Write the entries of new tokens into their pages, then attend over each row's pages.

    Args:
        query: [N, H, d].
        key, value: [writes, Hkv, d] of the first tokens, or None.
        batch: the tokens.
        layer: of the table.

    Returns:
        [N, H, d].
    """
    query = query.contiguous()
    stride = writes = 0
    if key is not None:
        assert value is not None
        dense = (key.shape[2], 1)
        if not key.stride()[1:] == value.stride()[1:] == dense or key.stride(0) != value.stride(0):
            key, value = key.contiguous(), value.contiguous()
        stride, writes = key.stride(0), len(key)
    out = torch.empty_like(query)
    kernels().mor_attend(
        byref(batch.struct), layer, query.shape[1], at(query), at(key), at(value), stride, writes,
        at(out), torch.get_num_threads(),
    )  # fmt: skip
    return out


class PackedStack:
    """Layers in a row, each over its own layer of a page table, in one call."""

    def __init__(self, layers: list[PackedLayer], work: Workspace) -> None:
        self.layers, self.work = layers, work
        self.structs = (POINTER(LayerStruct) * len(layers))(
            *(pointer(one.struct) for one in layers)
        )

    def rooms(self, count: int, with_kv: int, threads: int) -> tuple[int, ...]:
        """Addresses of room between the steps for ``count`` tokens: query to kept, of mor_stack."""
        one, work = self.layers[0], self.work
        width = one.heads * one.head_dim
        return (
            work.room("query", count * width),
            work.room("key_value", with_kv * 2 * one.kv_heads * one.head_dim),
            work.room("mixed", count * width), work.rows("rows", count, max(one.width, width)),
            work.rows("inner", count, one.inner), work.rows("kept", count, threads * shape()[0]),
        )  # fmt: skip

    def __call__(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        use: int | Tensor,
        with_kv: int,
        batch: Ragged,
        first: int,
    ) -> Tensor:
        """[M, D] -> [M, D].

        Args:
            x, cos, sin, use, with_kv: as of :meth:`PackedLayer.enter`.
            batch: the tokens' places.
            first: the table's layer of the first of these layers.
        """
        count, threads = len(x), torch.get_num_threads()
        out = x.clone(memory_format=torch.contiguous_format)
        uses = self.layers[0].uses_of(use, count)
        kernels().mor_stack(
            self.structs, len(self.layers), byref(batch.struct), first, out.data_ptr(),
            cos.data_ptr(), sin.data_ptr(), at(uses), count, with_kv,
            *self.rooms(count, with_kv, threads), threads,
        )  # fmt: skip
        return out
