"""Attention of sorted queries over growing prefixes of the keys, on the CPU.

Query i of a row sees keys 0..slots[i]. Where few queries meet many keys (KV sharing in training),
a mask over all of them would cost N S, and laying the queries at their slots S^2 / 2. Here sorted
queries are taken a chunk at a time, each over just the keys that its last query sees: half of N S,
plus half a chunk. PyTorch's own CPU kernel does each chunk, forward and backward; what is ours is
the walk over chunks and one gradient buffer that all of them add to. Where the kernels in C++ are
there, float32 goes to :class:`mor.ops.native.FlashAttention` instead.

The plain form is :func:`mor.ops.attention.slot_attention`.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mor.ops.native import Pieces

_CHUNK = 64  # the kernel's own query block; 32, 96 and 128 are as fast within a few per cent

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class Walk:
    """The chunks of one set of queries, and the masks of their last keys.

    All layers of a depth, forward and backward, take the same walk: masks are made once.

    Args:
        slots: [A, N] last key that each query sees, best ascending; None: query i sees 0..i.
    """

    def __init__(self, slots: Tensor | None) -> None:
        self.slots = slots
        self._masks: dict[tuple[int, int, int, torch.dtype], Tensor] = {}
        self._reach: list[int] | None = None
        self._pieces: Pieces | None = None

    def pieces(self, keys: int) -> Pieces:
        """The same over rows of ``keys`` keys, for the kernel in C++ that takes slots itself."""
        assert self.slots is not None
        if self._pieces is None:
            rows, queries = self.slots.shape
            self._pieces = Pieces.of_rows(rows, queries, keys, self.slots)
        return self._pieces

    def chunks(self, queries: int) -> list[tuple[int, int, int]]:
        """(first query, one past the last, keys they see) of each chunk."""
        starts = range(0, queries, _CHUNK)
        ends = [min(queries, start + _CHUNK) for start in starts]
        if self._reach is None and self.slots is not None:
            self._reach = [int(part.max()) + 1 for part in self.slots.split(_CHUNK, dim=1)]
        return list(zip(starts, ends, self._reach or ends, strict=True))

    def mask(self, start: int, end: int, reach: int, like: Tensor) -> Tensor:
        """[A, 1, end - start, reach]: 0 where the key is seen, -inf elsewhere."""
        name = (start, end, reach, like.dtype)
        if name not in self._masks:
            if self.slots is None:
                return _causal_mask(*name).expand(like.shape[0], -1, -1, -1)
            self._masks[name] = _mask(self.slots[:, start:end], reach, like.dtype)
        return self._masks[name]


def _mask(slots: Tensor, reach: int, dtype: torch.dtype) -> Tensor:
    hidden = torch.arange(reach, device=slots.device) > slots[:, None, :, None]
    zeros = torch.zeros(hidden.shape, dtype=dtype, device=slots.device)
    return zeros.masked_fill_(hidden, -torch.inf)


@lru_cache(maxsize=256)
def _causal_mask(start: int, end: int, reach: int, dtype: torch.dtype) -> Tensor:
    return _mask(torch.arange(start, end, device="cpu")[None], reach, dtype)


def _token_major(like: Tensor, heads: int, length: int) -> Tensor:
    """Empty [A, heads, length, d], a token's heads side by side, as projections lay them."""
    shape = (like.shape[0], length, heads, like.shape[3])
    return like.new_empty(shape).transpose(1, 2)


class PrefixAttention(torch.autograd.Function):
    """``apply(query [A, H, N, d], key, value [A, Hkv, S, d], walk)``; CPU only."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, walk: Walk) -> Tensor:
        """[A, H, N, d]."""
        out = _token_major(query, query.shape[1], query.shape[2])
        ctx.walk, sums = walk, []
        for start, end, reach in walk.chunks(query.shape[2]):
            mask = walk.mask(start, end, reach, query)
            part, log_sum = _forward(
                query[:, :, start:end], key[:, :, :reach], value[:, :, :reach], attn_mask=mask
            )
            out[:, :, start:end] = part
            sums.append(log_sum)
        ctx.save_for_backward(query, key, value, out, *sums)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, direction: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        """Gradients of query, key and value."""
        query, key, value, out, *sums = ctx.saved_tensors
        to_query = _token_major(query, query.shape[1], query.shape[2])
        to_key = _token_major(key, key.shape[1], key.shape[2]).zero_()
        to_value = _token_major(value, value.shape[1], value.shape[2]).zero_()
        for (start, end, reach), log_sum in zip(ctx.walk.chunks(query.shape[2]), sums, strict=True):
            part_query, part_key, part_value = _backward(
                direction[:, :, start:end],
                query[:, :, start:end],
                key[:, :, :reach],
                value[:, :, :reach],
                out[:, :, start:end],
                log_sum,
                0.0,
                False,
                attn_mask=ctx.walk.mask(start, end, reach, query),
            )
            to_query[:, :, start:end] = part_query
            to_key[:, :, :reach] += part_key
            to_value[:, :, :reach] += part_value
        return to_query, to_key, to_value, None
