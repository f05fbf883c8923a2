"""Attention over segments with one dense mask: the plain form that the fast ones are held to."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mor.ops.attention import SharedSegments, slot_attention
from mor.ops.prefix import Walk
from mor.ops.segments import Segments


def run_ids(segments: Segments) -> Tensor:
    """[N] the name of each token's segment."""
    return torch.tensor(segments.names).repeat_interleave(torch.tensor(segments.lengths))


def masked(query: Tensor, key: Tensor, value: Tensor, visible: Tensor) -> Tensor:
    """[N, H, d] over [S, Hkv, d] where ``visible`` [N, S]; each query sees one key at least."""
    groups = query.shape[1] // key.shape[1]
    key, value = (t.repeat_interleave(groups, 1).transpose(0, 1) for t in (key, value))
    found = F.scaled_dot_product_attention(query.transpose(0, 1), key, value, attn_mask=visible)
    return found.transpose(0, 1)


def segment_attention(query: Tensor, key: Tensor, value: Tensor, segments: Segments) -> Tensor:
    """The same segment, and not later."""
    shared = SharedSegments(torch.arange(len(query)), segments, segments)
    return shared_segment_attention(query, key, value, shared)


def shared_segment_attention(
    query: Tensor, key: Tensor, value: Tensor, shared: SharedSegments
) -> Tensor:
    """The segment of the same name, up to the query's own place."""
    same = run_ids(shared.queries)[:, None] == run_ids(shared.keys)
    return masked(query, key, value, same & (torch.arange(len(key)) <= shared.places[:, None]))


def prefix_attention(query: Tensor, key: Tensor, value: Tensor, walk: Walk) -> Tensor:
    """The masked form over the same slots."""
    assert walk.slots is not None
    return slot_attention(query, key, value, walk.slots)
