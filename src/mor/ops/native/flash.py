"""Attention in training on the CPU: pieces that lie end to end, forward and backward.

A piece is a run of queries and the run of keys that they meet: a sequence, a document, the tokens
of a row that a router chose, or those and the keys of all. Nothing is padded, copied into rows or
masked. Results do not depend on the number of threads, nor on the pieces beside a piece.

The plain forms are :func:`mor.ops.attention.padded_segment_attention` and
:func:`mor.ops.attention.slot_attention`.
"""

from __future__ import annotations

from ctypes import byref
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mor.ops.native.build import library
from mor.ops.native.calls import FlashGradientsStruct, FlashStruct, at, kernels


class Pieces:
    """Which queries meet which keys.

    Args:
        table: a row per piece: its first query, number of queries, first key, number of keys.
        slots: [N] last key that each query sees, counted from its piece's first key; None: query i
            of a piece sees keys 0..i.
    """

    def __init__(self, table: list[tuple[int, int, int, int]], slots: Tensor | None = None) -> None:
        self.table = torch.tensor(table, dtype=torch.long, device="cpu").view(-1, 4)
        self.slots = None if slots is None else slots.to(torch.long).contiguous()

    @classmethod
    def of_rows(cls, rows: int, queries: int, keys: int, slots: Tensor | None = None) -> Pieces:
        """Rows of equal length, one after the other; ``slots`` [rows, queries]."""
        table = [(row * queries, queries, row * keys, keys) for row in range(rows)]
        return cls(table, None if slots is None else slots.flatten())


def trains(*tensors: Tensor) -> bool:
    """Whether :class:`FlashAttention` can work on these.

    Plain float32 tensors in the CPU's memory, outside of ``torch.compile`` and autocast.
    """
    if torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu"):
        return False
    for tensor in tensors:
        if type(tensor) is not Tensor or tensor.dtype != torch.float32:
            return False
        if tensor.device.type != "cpu":
            return False
    return library() is not None


class FlashAttention(torch.autograd.Function):
    """``apply(query [N, H, d], key, value [S, Hkv, d], pieces)`` -> [N, H, d].

    Every query belongs to one piece, every key to one at most. Gradients once, not twice.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, pieces: Pieces) -> Tensor:
        """[N, H, d]."""
        query, key, value = query.contiguous(), key.contiguous(), value.contiguous()
        out, sums = torch.empty_like(query), query.new_empty(query.shape[:2])
        struct = _struct(query, key, value, out, sums, pieces)
        kernels().mor_flash(byref(struct), torch.get_num_threads())
        ctx.pieces = pieces
        ctx.save_for_backward(query, key, value, out, sums)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, direction: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        """Gradients of query, key and value."""
        query, key, value, out, sums = ctx.saved_tensors
        direction = direction.contiguous()
        struct = _struct(query, key, value, out, sums, ctx.pieces)
        to = torch.empty_like(query), torch.zeros_like(key), torch.zeros_like(value)
        gradients = FlashGradientsStruct(at(direction), *map(at, to))
        kernels().mor_flash_backward(byref(struct), byref(gradients), torch.get_num_threads())
        return *to, None


def _struct(
    query: Tensor, key: Tensor, value: Tensor, out: Tensor, sums: Tensor, pieces: Pieces
) -> FlashStruct:
    tensors = (query, key, value, out, sums, pieces.table, pieces.slots)
    return FlashStruct(
        *map(at, tensors), len(pieces.table), query.shape[1], key.shape[1], query.shape[2]
    )
