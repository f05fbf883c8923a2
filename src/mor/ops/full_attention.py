"""Attention in both directions: a query sees every key of its row or segment, later ones too.

For encoders, where nothing is generated. :func:`masked_attention` is the plain form, with a mask,
which the others are held equal to.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from inspect import signature
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mor.ops.segments import Group, Segments, attend_by_groups

_HALF = (torch.float16, torch.bfloat16)


def masked_attention(
    query: Tensor, key: Tensor, value: Tensor, seen: Tensor | None = None
) -> Tensor:
    """Every query over the keys that it may see.

    Args:
        query: [B, H, N, d]; key, value: [B, Hkv, S, d].
        seen: bool, to [B, H, N, S]; None for all keys.

    Returns:
        [B, H, N, d].
    """
    grouped = query.shape[1] != key.shape[1]
    return F.scaled_dot_product_attention(query, key, value, attn_mask=seen, enable_gqa=grouped)


@dataclass(frozen=True)
class Meeting:
    """Tokens laid end to end that each meet all keys of the segment of the same name.

    All layers of a depth take the same one: groups and masks are made once.

    Attributes:
        queries, keys: how both are laid; every query segment has a key segment of its name.
    """

    queries: Segments
    keys: Segments

    @cached_property
    def groups(self) -> tuple[tuple[Group, Group, Tensor | None], ...]:
        """Query segments of similar length, their keys as rows, and which keys are real.

        The last is bool [runs, 1, 1, longest], or None where all of them are.
        """
        number = {name: run for run, name in enumerate(self.keys.names)}
        found = []
        for group in self.queries.groups:
            runs = [number[self.queries.names[run]] for run in group.runs]
            keys = self.keys.selected(runs)
            seen = None
            if len(keys.places) < len(runs) * keys.longest:
                places = torch.arange(keys.longest, device=self.keys.device)
                own = [self.keys.lengths[run] for run in runs]
                lengths = torch.tensor(own, device=places.device)
                seen = (places < lengths[:, None])[:, None, None]
            found.append((group, keys, seen))
        return tuple(found)


def meeting_attention(query: Tensor, key: Tensor, value: Tensor, meeting: Meeting) -> Tensor:
    """Attention of query [N, H, d] over key, value [S, Hkv, d] as ``meeting`` says: [N, H, d]."""
    kind = query.device.type
    if torch.is_autocast_enabled(kind):  # as autocast would; not every kernel knows of it
        dtype = torch.get_autocast_dtype(kind)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    same = meeting.queries.names == meeting.keys.names
    if kind == "cuda" and same and query.dtype in _HALF and query.shape[-1] % 8 == 0:
        return _varlen(query, key, value, meeting)
    return attend_by_groups(query, key, value, meeting.queries, meeting.groups, masked_attention)


def _varlen(query: Tensor, key: Tensor, value: Tensor, meeting: Meeting) -> Tensor:
    """PyTorch's FlashAttention for sequences of unequal length; half precision on CUDA."""
    # Here, not above: torch registers its kernels with this module, and the CPU needs none.
    from torch.nn.attention.varlen import varlen_attn

    options: dict[str, Any] = {}  # its window is open on both sides
    groups = query.shape[1] // key.shape[1]
    if groups > 1 and "enable_gqa" in signature(varlen_attn).parameters:
        options["enable_gqa"] = True
    elif groups > 1:  # torch 2.11
        key, value = (tokens.repeat_interleave(groups, dim=1) for tokens in (key, value))
    ours, theirs = meeting.queries, meeting.keys
    found = varlen_attn(
        query, key, value, ours.offsets, theirs.offsets, ours.longest, theirs.longest, **options
    )
    assert isinstance(found, Tensor)
    return found
