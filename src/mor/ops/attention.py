"""Attention forms: over front-packed rows, over segments laid end to end, over shared keys.

A front-packed row has its real tokens in order at the front and padding behind. Plain causal
attention is then exact for every real query without any mask, because padding comes later than all
of them. :func:`slot_attention` is the plain form with a mask, which the others are held equal to.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from inspect import signature
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mor.ops import native
from mor.ops.prefix import PrefixAttention, Walk
from mor.ops.segments import Group, Runs, Segments, attend_by_groups

_HALF = (torch.float16, torch.bfloat16)
# From this many queries on, a walk over chunks beats the kernel's own causal walk on the CPU.
_WALK = 128


def _attend(query: Tensor, key: Tensor, value: Tensor, **options: object) -> Tensor:
    grouped = query.shape[1] != key.shape[1]
    return F.scaled_dot_product_attention(query, key, value, enable_gqa=grouped, **options)  # type: ignore[arg-type]


def _trains(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether gradients on the CPU are wanted, and the kernel in C++ for them can work on these."""
    return _walks(query, key, value) and native.trains(query, key, value)


def _flash_rows(query: Tensor, key: Tensor, value: Tensor, pieces: native.Pieces) -> Tensor:
    """The kernel over rows [A, H, N, d], which lie token by token as projections make them."""
    tokens = (heads.transpose(1, 2).flatten(0, 1) for heads in (query, key, value))
    found = native.FlashAttention.apply(*tokens, pieces)
    return found.unflatten(0, (query.shape[0], query.shape[2])).transpose(1, 2)


def _walks(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether gradients on the CPU are wanted: :class:`PrefixAttention` is for these."""
    if query.device.type != "cpu" or torch.compiler.is_compiling():
        return False
    wanted = query.requires_grad or key.requires_grad or value.requires_grad
    return wanted and torch.is_grad_enabled()


def _cast(*tensors: Tensor) -> Iterator[Tensor]:
    """As autocast would for PyTorch's attention; it does not know of other kernels."""
    kind = tensors[0].device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    return (tensor if dtype is None else tensor.to(dtype) for tensor in tensors)


def causal_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Query i sees keys 0..i of its own row.

    Args:
        query: [B, H, N, d]; key, value: [B, Hkv, N, d].

    Returns:
        [B, H, N, d].
    """
    if _trains(query, key, value):
        rows, _, length, _ = query.shape
        return _flash_rows(query, key, value, native.Pieces.of_rows(rows, length, length))
    if query.shape[2] >= _WALK and _walks(query, key, value):
        return PrefixAttention.apply(*_cast(query, key, value), Walk(None))
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
    """The same as :func:`slot_attention` without a mask: each query is laid at its slot.

    Used where few queries meet a full row of keys and no kernel takes slots. Slots of one row must
    differ. It costs S^2 / 2, the mask N S; a causal kernel is the fast one on every GPU.
    """
    index = slots[:, None, :, None].expand_as(query)
    row = query.new_zeros(*query.shape[:2], key.shape[2], query.shape[3]).scatter(2, index, query)
    return causal_attention(row, key, value).gather(2, index)


def prefix_attention(query: Tensor, key: Tensor, value: Tensor, walk: Walk) -> Tensor:
    """:func:`slot_attention` for slots that differ within each row: training's form.

    Args:
        query: [B, H, N, d]; key, value: [B, Hkv, S, d].
        walk: over slots [B, N]; the same object for all layers, so that its masks are made once.
    """
    assert walk.slots is not None
    if _trains(query, key, value):
        return _flash_rows(query, key, value, walk.pieces(key.shape[2]))
    if _walks(query, key, value):
        return PrefixAttention.apply(*_cast(query, key, value), walk)
    if query.device.type == "cpu":
        return slot_attention(query, key, value, walk.slots)
    return scattered_attention(query, key, value, walk.slots)


def segment_attention(
    query: Tensor, key: Tensor, value: Tensor, segments: Segments | Runs
) -> Tensor:
    """Causal attention within each segment.

    Args:
        query: [N, H, d]; key, value: [N, Hkv, d], the segments laid end to end.

    Returns:
        [N, H, d].
    """
    if isinstance(segments, Runs):
        query, key, value = _cast(query, key, value)
        return _run_attention(query, key, value, segments)
    if _trains(query, key, value):
        return native.FlashAttention.apply(query, key, value, segments.pieces)
    if query.device.type == "cpu":
        return segments.merged([_one_group(query, key, value, g) for g in segments.groups])
    query, key, value = _cast(query, key, value)
    if _takes_lengths(query):
        return _varlen(query, key, value, segments)
    return padded_segment_attention(query, key, value, segments)


def _run_attention(query: Tensor, key: Tensor, value: Tensor, runs: Runs) -> Tensor:
    """:func:`segment_attention` where the host does not know lengths."""
    if not _takes_lengths(query):
        return padded_segment_attention(query, key, value, runs)
    # The kernel neither reads nor writes behind the last run, not even gradients.
    query, key, value = map(runs.clear, (query, key, value))
    return runs.clear(_varlen(query, key, value, runs))


def _takes_lengths(query: Tensor) -> bool:
    """Whether PyTorch has a kernel for sequences of unequal length."""
    return query.device.type == "cuda" and query.dtype in _HALF and query.shape[-1] % 8 == 0


def _varlen(query: Tensor, key: Tensor, value: Tensor, segments: Segments | Runs) -> Tensor:
    """PyTorch's FlashAttention for sequences of unequal length; half precision on CUDA."""
    # Here, not above: torch registers its kernels with this module, and the CPU needs none.
    from torch.nn.attention.varlen import varlen_attn

    options: dict[str, Any] = {"window_size": (-1, 0)}  # causal
    groups = query.shape[1] // key.shape[1]
    if groups > 1 and "enable_gqa" in signature(varlen_attn).parameters:
        options["enable_gqa"] = True
    elif groups > 1:  # torch 2.11
        key, value = (tokens.repeat_interleave(groups, dim=1) for tokens in (key, value))
    offsets, longest = segments.offsets, segments.longest
    found = varlen_attn(query, key, value, offsets, offsets, longest, longest, **options)
    assert isinstance(found, Tensor)
    return found


def padded_segment_attention(
    query: Tensor, key: Tensor, value: Tensor, segments: Segments | Runs
) -> Tensor:
    """The plain form of :func:`segment_attention`: a padded row for every segment."""
    rows = (segments.pad(tokens).transpose(1, 2) for tokens in (query, key, value))
    return segments.unpad(_attend(*rows, is_causal=True).transpose(1, 2))


@dataclass(frozen=True)
class SharedSegments:
    """Some tokens that meet the keys of all: each from its segment's first key to its own.

    Attributes:
        places: [N] where each query's own key stands among the S keys, ascending.
        queries, keys: how the N and the S tokens are laid end to end; every query segment has a
            key segment of the same name.
    """

    places: Tensor
    queries: Segments
    keys: Segments

    @cached_property
    def pieces(self) -> native.Pieces:
        """The same for the CPU's kernel."""
        number = {name: run for run, name in enumerate(self.keys.names)}
        runs = [number[name] for name in self.queries.names]
        starts = [self.keys.starts[run] for run in runs]
        lengths = [self.keys.lengths[run] for run in runs]
        counts = torch.tensor(self.queries.lengths, device=self.places.device)
        firsts = torch.tensor(starts, device=self.places.device).repeat_interleave(counts)
        table = zip(self.queries.starts, self.queries.lengths, starts, lengths, strict=True)
        return native.Pieces(list(table), self.places - firsts)

    @cached_property
    def groups(self) -> tuple[tuple[Group, Group, Walk], ...]:
        """Queries of similar number, the keys that they meet, and the walk over them."""
        number = {name: run for run, name in enumerate(self.keys.names)}
        found = []
        for group in self.queries.groups:
            keys = self.keys.selected([number[self.queries.names[run]] for run in group.runs])
            begins = [self.keys.starts[run] for run in keys.runs]
            begins_at = torch.tensor(begins, device=self.places.device)[:, None]
            # Behind a short row stand queries that nobody reads; they have to see a key at least.
            slots = (group.rows(self.places) - begins_at).clamp(min=0)
            found.append((group, keys, Walk(slots)))
        return tuple(found)


@dataclass(frozen=True)
class SharedRuns:
    """The same where the host does not know how many queries there are.

    Attributes:
        places: [N] where each query's own key stands among the S keys; S for those not real.
        keys: how the S keys are laid end to end.
    """

    places: Tensor
    keys: Segments | Runs


def shared_run_attention(query: Tensor, key: Tensor, value: Tensor, shared: SharedRuns) -> Tensor:
    """Attention of query [N, H, d] over key, value [S, Hkv, d]: [N, H, d]; zeros if not real."""
    row = query.new_zeros(len(key) + 1, *query.shape[1:]).index_copy(0, shared.places, query)
    found = segment_attention(row[:-1], key, value, shared.keys)
    found = torch.cat((found, found.new_zeros(1, *found.shape[1:])))
    return found.index_select(0, shared.places)


def shared_segment_attention(
    query: Tensor, key: Tensor, value: Tensor, shared: SharedSegments
) -> Tensor:
    """Attention of query [N, H, d] over key, value [S, Hkv, d] as ``shared`` says: [N, H, d]."""
    if _trains(query, key, value):
        return native.FlashAttention.apply(query, key, value, shared.pieces)
    if query.device.type != "cpu":
        return scattered_segment_attention(query, key, value, shared)
    return attend_by_groups(query, key, value, shared.queries, shared.groups, prefix_attention)


def scattered_segment_attention(
    query: Tensor, key: Tensor, value: Tensor, shared: SharedSegments
) -> Tensor:
    """:func:`shared_segment_attention` with each query laid at its own place among the keys."""
    row = query.new_zeros(key.shape[0], *query.shape[1:]).index_copy(0, shared.places, query)
    return segment_attention(row, key, value, shared.keys).index_select(0, shared.places)


def _one_group(query: Tensor, key: Tensor, value: Tensor, group: Group) -> Tensor:
    """Runs of similar length as rows, [n, H, d]."""
    one, two, three = (group.rows(tokens).transpose(1, 2) for tokens in (query, key, value))
    return group.flat(causal_attention(one, two, three).transpose(1, 2))
