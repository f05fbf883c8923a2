"""Attention over segments with one dense mask: the plain form that the fast ones are held to."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

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
    places = torch.arange(len(query))
    return shared_segment_attention(query, key, value, places, segments, segments)


def shared_segment_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    places: Tensor,
    query_segments: Segments,
    key_segments: Segments,
) -> Tensor:
    """The segment of the same name, up to the query's own place."""
    same = run_ids(query_segments)[:, None] == run_ids(key_segments)
    return masked(query, key, value, same & (torch.arange(len(key)) <= places[:, None]))
