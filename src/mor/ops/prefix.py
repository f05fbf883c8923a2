"""Attention of sorted queries over growing prefixes of the keys, on the CPU.

Query i of a row sees keys 0..slots[i]. Where few queries meet many keys (KV sharing in training),
a mask over all of them would cost N S, and laying the queries at their slots S^2 / 2. Here sorted
queries are taken a chunk at a time, each over just the keys that its last query sees: half of N S,
plus half a chunk. PyTorch's own CPU kernel does each chunk, forward and backward; what is ours is
the walk over chunks and one gradient buffer that all of them add to.

The plain form is :func:`mor.ops.attention.slot_attention`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_CHUNK = 64  # the kernel's own query block; 32, 96 and 128 are as fast within a few per cent

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def _chunks(slots: Tensor | None, queries: int, keys: int) -> list[tuple[int, int, int]]:
    """(first query, one past the last, keys they see) of each chunk."""
    starts = range(0, queries, _CHUNK)
    ends = [min(queries, start + _CHUNK) for start in starts]
    reach = ends
    if slots is not None:
        reach = [int(part.max()) + 1 for part in slots.split(_CHUNK, dim=1)]
    return [(a, b, min(hi, keys)) for a, b, hi in zip(starts, ends, reach, strict=True)]


def _mask(slots: Tensor | None, start: int, end: int, reach: int, like: Tensor) -> Tensor:
    """[A or 1, 1, end - start, reach]: 0 where the key is seen, -inf elsewhere."""
    own = torch.arange(start, end)[None] if slots is None else slots[:, start:end]
    hidden = torch.arange(reach) > own[:, None, :, None]
    mask = torch.zeros(hidden.shape, dtype=like.dtype).masked_fill_(hidden, -torch.inf)
    return mask.expand(like.shape[0], -1, -1, -1)


def _token_major(like: Tensor, heads: int, length: int) -> Tensor:
    """Empty [A, heads, length, d], a token's heads side by side, as projections lay them."""
    shape = (like.shape[0], length, heads, like.shape[3])
    return torch.empty(shape, dtype=like.dtype).transpose(1, 2)


class PrefixAttention(torch.autograd.Function):
    """``apply(query [A, H, N, d], key, value [A, Hkv, S, d], slots [A, N] or None)``.

    None for ``slots`` means that query i sees keys 0..i. Any slots are right, ascending ones are
    fast. CPU only.
    """

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, slots: Tensor | None
    ) -> Tensor:
        """[A, H, N, d]."""
        out = _token_major(query, query.shape[1], query.shape[2])
        ctx.chunks = _chunks(slots, query.shape[2], key.shape[2])
        sums = []
        for start, end, reach in ctx.chunks:
            mask = _mask(slots, start, end, reach, query)
            part, log_sum = _forward(
                query[:, :, start:end], key[:, :, :reach], value[:, :, :reach], attn_mask=mask
            )
            out[:, :, start:end] = part
            sums.append(log_sum)
        ctx.save_for_backward(query, key, value, slots, out, *sums)
        return out

    @staticmethod
    def backward(ctx: Any, direction: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        """Gradients of query, key and value."""
        query, key, value, slots, out, *sums = ctx.saved_tensors
        to_query = _token_major(query, query.shape[1], query.shape[2])
        to_key = _token_major(key, key.shape[1], key.shape[2]).zero_()
        to_value = _token_major(value, value.shape[1], value.shape[2]).zero_()
        for (start, end, reach), log_sum in zip(ctx.chunks, sums, strict=True):
            part_query, part_key, part_value = _backward(
                direction[:, :, start:end],
                query[:, :, start:end],
                key[:, :, :reach],
                value[:, :, :reach],
                out[:, :, start:end],
                log_sum,
                0.0,
                False,
                attn_mask=_mask(slots, start, end, reach, query),
            )
            to_query[:, :, start:end] = part_query
            to_key[:, :, :reach] += part_key
            to_value[:, :, :reach] += part_value
        return to_query, to_key, to_value, None
