"""Attention over rows whose real tokens stand in order at the front.

A row is front-packed: entries 0..length-1 are real and in order, what follows is padding. Plain
causal attention is then exact for every real query without any mask, because padding comes later
than all of them. The three forms below differ in where the keys are.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def _repeat_heads(heads: Tensor, groups: int) -> Tensor:
    """[B, Hkv, S, d] -> [B, Hkv * groups, S, d]; each KV head serves ``groups`` query heads."""
    if groups == 1:
        return heads
    batch, count, length, width = heads.shape
    spread = heads[:, :, None].expand(batch, count, groups, length, width)
    return spread.reshape(batch, count * groups, length, width)


def _attend(query: Tensor, key: Tensor, value: Tensor, **options: object) -> Tensor:
    groups = query.shape[1] // key.shape[1]
    key, value = _repeat_heads(key, groups), _repeat_heads(value, groups)
    return F.scaled_dot_product_attention(query, key, value, **options)  # type: ignore[arg-type]


def causal_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Query i sees keys 0..i of its own row.

    Args:
        query: [B, H, N, d]; key, value: [B, Hkv, N, d].

    Returns:
        [B, H, N, d].
    """
    return _attend(query, key, value, is_causal=True)


def slot_attention(query: Tensor, key: Tensor, value: Tensor, slots: Tensor) -> Tensor:
    """Query i sees keys 0..slots[i]: the plain form, with a mask, for any queries and keys.

    Args:
        query: [B, H, N, d]; key, value: [B, Hkv, S, d]; slots: [B, N], each in 0..S-1.

    Returns:
        [B, H, N, d].
    """
    columns = torch.arange(key.shape[2], device=key.device)
    visible = columns <= slots[:, None, :, None]
    return _attend(query, key, value, attn_mask=visible)


def scattered_attention(query: Tensor, key: Tensor, value: Tensor, slots: Tensor) -> Tensor:
    """The same result as :func:`slot_attention` without a mask: each query is laid at its slot.

    Used in training under KV sharing, where few queries meet a full row of keys. Slots of one row
    must differ. The attention itself then costs S^2 / 2, the mask would cost N S: equal over the
    default capacities of R = 3, and a causal kernel is the fast one everywhere.
    """
    batch, heads, _, width = query.shape
    index = slots[:, None, :, None].expand_as(query)
    row = query.new_zeros(batch, heads, key.shape[2], width).scatter(2, index, query)
    return causal_attention(row, key, value).gather(2, index)
