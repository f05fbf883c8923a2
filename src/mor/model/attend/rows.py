"""Keys and values during one forward pass without a cache: training and plain evaluation.

The recursion asks :class:`RowKV` for one
:class:`~mor.model.attend.protocol.Attend` per stage and depth.
:class:`mor.model.attend.cached.CacheKV` answers the same calls with a cache behind it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mor.config import MoRConfig
from mor.model.attend.protocol import KV, Attend
from mor.ops import planned
from mor.ops.attention import (
    SharedRuns,
    SharedSegments,
    causal_attention,
    prefix_attention,
    segment_attention,
    shared_run_attention,
    shared_segment_attention,
)
from mor.ops.compaction import Packing
from mor.ops.full_attention import Meeting, masked_attention, meeting_attention
from mor.ops.prefix import Walk
from mor.ops.segments import Runs, Segments


def _end_to_end(heads: Tensor) -> Tensor:
    """[A, H, M, d] -> [A M, H, d]: a view, since projections lay a token's heads side by side."""
    return heads.transpose(1, 2).flatten(0, 1)


def _as_rows(tokens: Tensor, like: Tensor) -> Tensor:
    """[A M, H, d] -> [A, H, M, d], A and M as in ``like``."""
    return tokens.unflatten(0, (like.shape[0], like.shape[2])).transpose(1, 2)


class CausalAttend(Attend):
    """Own keys and values of these tokens only: recursion-wise caching (paper 2.3).

    Args:
        segments: what sees what among the tokens laid end to end; None for rows of their own.
    """

    def __init__(self, segments: Segments | Runs | None = None) -> None:
        self.segments = segments

    def needs_kv(self, layer: int) -> bool:
        """True: every layer computes its own keys and values."""
        return True

    def __call__(
        self, layer: int, query: Tensor, key: Tensor | None, value: Tensor | None
    ) -> Tensor:
        """Plain causal attention within each row or segment."""
        assert key is not None
        assert value is not None
        if self.segments is None:
            return causal_attention(query, key, value)
        one, two, three = _end_to_end(query), _end_to_end(key), _end_to_end(value)
        return _as_rows(segment_attention(one, two, three, self.segments), query)


class FullAttend(CausalAttend):
    """The same in both directions, for encoders: every token of the row or segment is seen."""

    def __init__(self, segments: Segments | Runs | None = None) -> None:
        super().__init__(segments)
        assert not isinstance(segments, Runs)  # encoders ask for lengths
        self.meeting = None if segments is None else Meeting(segments, segments)

    def __call__(
        self, layer: int, query: Tensor, key: Tensor | None, value: Tensor | None
    ) -> Tensor:
        """Attention over all tokens of each row or segment."""
        assert key is not None
        assert value is not None
        if self.meeting is None:
            return masked_attention(query, key, value)
        one, two, three = _end_to_end(query), _end_to_end(key), _end_to_end(value)
        return _as_rows(meeting_attention(one, two, three, self.meeting), query)


class PaddedAttend(CausalAttend):
    """The same among rows [A, M] that keep their padding: real tokens see real tokens.

    For traced graphs (``torch.export``), whose shapes cannot depend on a mask.

    Args:
        real: [A, M] bool.
        is_causal: whether a token sees earlier ones alone.
    """

    def __init__(self, real: Tensor, is_causal: bool = True) -> None:
        super().__init__()
        width = real.shape[1]
        causal = torch.ones(width, width, dtype=torch.bool, device=real.device)
        causal = causal.tril() if is_causal else causal
        itself = torch.eye(width, dtype=torch.bool, device=real.device)
        # Padding sees itself: a row of nothing would be nan.
        self.seen = ((real[:, None] & causal) | itself)[:, None]

    def __call__(
        self, layer: int, query: Tensor, key: Tensor | None, value: Tensor | None
    ) -> Tensor:
        """Attention over the real tokens up to each."""
        assert key is not None
        assert value is not None
        groups = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        return F.scaled_dot_product_attention(query, key, value, attn_mask=self.seen)


@dataclass(frozen=True)
class Shared:
    """How a later depth's tokens meet the keys that depth 0 stored.

    Attributes:
        places: [A M] where each token stands among the stored ones laid end to end.
        how: over segments, over runs of unknown lengths, or over rows of equal length; the last
            two see all keys of a segment or, None, of a row.
    """

    places: Tensor
    how: SharedSegments | SharedRuns | Walk | Meeting | None

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """[A, H, M, d] over stored [A0, Hkv, M0, d]; causal, each query up to its own place."""
        if self.how is None:
            return masked_attention(query, key, value)
        if isinstance(self.how, Walk):
            return prefix_attention(query, key, value, self.how)
        one, two, three = _end_to_end(query), _end_to_end(key), _end_to_end(value)
        if isinstance(self.how, Meeting):
            return _as_rows(meeting_attention(one, two, three, self.how), query)
        if isinstance(self.how, SharedRuns):
            return _as_rows(shared_run_attention(one, two, three, self.how), query)
        return _as_rows(shared_segment_attention(one, two, three, self.how), query)

    def refresh(self, stored: Tensor, fresh: Tensor) -> Tensor:
        """Stored heads with those of this depth's tokens replaced, for this depth only."""
        room = _end_to_end(stored)
        if isinstance(self.how, SharedRuns):  # a place for what is not real
            room = torch.cat((room, room.new_zeros(1, *room.shape[1:])))
        written = room.index_copy(0, self.places, _end_to_end(fresh))
        return _as_rows(written[: len(written) - isinstance(self.how, SharedRuns)], stored)


class SharedAttend(Attend):
    """Recursive KV sharing: the first use of a shared layer stores, later uses read (paper 2.3).

    Args:
        config: for which unrolled layer uses which shared layer.
        store: keys and values of first uses, by shared layer.
        own: attention of these tokens among themselves.
        shared: how they meet the stored ones; None where they are the same tokens.
    """

    def __init__(
        self,
        config: MoRConfig,
        store: dict[int, tuple[Tensor, Tensor]],
        own: CausalAttend,
        shared: Shared | None,
    ) -> None:
        self.config, self.store, self.own, self.shared = config, store, own, shared
        self.update = config.kv_sharing == "recursive_update"

    def _first(self, layer: int) -> bool:
        return self.config.repetition(layer) == 0

    def needs_kv(self, layer: int) -> bool:
        """True for a layer's first use, and for all where active tokens refresh their entries."""
        return self._first(layer) or self.update

    def __call__(
        self, layer: int, query: Tensor, key: Tensor | None, value: Tensor | None
    ) -> Tensor:
        """Attention of the queries over the stored tokens."""
        name = self.config.shared_layer(layer)
        if self._first(layer):
            assert key is not None
            assert value is not None
            # Kept from the first pass: checkpointing runs this again in the backward pass.
            self.store.setdefault(name, (key, value))
            return self.own(layer, query, key, value)
        keys, values = self.store[name]
        if self.shared is None:
            return self.own(layer, query, *((key, value) if self.update else (keys, values)))
        if self.update:
            assert key is not None
            assert value is not None
            keys, values = self.shared.refresh(keys, key), self.shared.refresh(values, value)
        return self.shared.attend(query, keys, values)


class RowKV(KV):
    """Keys and values of one forward pass over tokens [A, M], nothing kept afterwards.

    Args:
        config: the model's.
        shape: A and M.
        runs: [A M] which tokens see each other, as non-decreasing numbers (rows laid end to end, or
            documents); None for the rows themselves.
        padded: how all tokens see each other where padding stays; every token runs every depth.
    """

    flat = True

    def __init__(
        self,
        config: MoRConfig,
        shape: tuple[int, int],
        runs: Tensor | None,
        padded: PaddedAttend | None = None,
    ) -> None:
        self.config, self.shape, self.runs = config, shape, runs
        self.store: dict[int, tuple[Tensor, Tensor]] = {}
        self.first: Packing | None = None
        self.first_segments: Segments | Runs | None = None
        self.kind = CausalAttend if config.is_causal else FullAttend
        self.everybody = padded or self.kind(None if runs is None else Segments.of(runs))

    def prelude(self) -> Attend:
        """Attention of all tokens."""
        return self.everybody

    def coda(self) -> Attend:
        """Attention of all tokens."""
        return self.everybody

    def finish(self) -> None:
        """Nothing is kept after the forward pass."""

    def _among(self, packing: Packing | None) -> CausalAttend:
        """Attention of the tokens of ``packing`` among themselves."""
        if packing is None:
            return self.everybody
        if knows_no_lengths(packing):
            assert packing.row_of is not None
            assert packing.valid is not None
            return self.kind(Runs(packing.row_of, packing.valid[0], *self.shape))
        runs = packing.row_of if self.runs is None else self.runs[packing.flat.flatten()]
        return self.kind(None if runs is None else Segments.of(runs))

    def depth(self, depth: int, packing: Packing | None) -> Attend:
        """Active tokens among themselves, or over those of depth 0 under sharing."""
        own = self._among(packing)
        if self.config.kv_sharing == "none":
            return own
        if depth == 0:
            self.first, self.first_segments = packing, own.segments
        shared = None if packing is self.first else self._reach(packing, own.segments)
        return SharedAttend(self.config, self.store, own, shared)

    def _reach(self, packing: Packing | None, queries: Segments | Runs | None) -> Shared:
        """Where the tokens of ``packing`` stand among those of depth 0."""
        assert packing is not None
        flat, keys = packing.flat.flatten(), self.first_segments
        rows, width = self.shape if self.first is None else self.first.flat.shape
        places = flat
        if self.first is not None:
            stored = self.first.flat.flatten()
            where = torch.zeros(self.shape[0] * self.shape[1], dtype=torch.long, device=flat.device)
            where[stored] = torch.arange(len(stored), device=flat.device)
            places = where[flat]
        causal = self.config.is_causal
        if queries is None and not causal:
            return Shared(places, None)
        if queries is None:
            return Shared(places, Walk(places.view(packing.flat.shape) % width))
        keys = Segments.of_rows(rows, width, flat.device) if keys is None else keys
        if isinstance(queries, Runs):
            places = torch.where(queries.real, places, rows * width)
            return Shared(places, SharedRuns(places, keys))
        assert not isinstance(keys, Runs)
        if not causal:
            return Shared(places, Meeting(queries, keys))
        return Shared(places, SharedSegments(places, queries, keys))


def knows_no_lengths(packing: Packing) -> bool:
    """Whether tokens are laid end to end, in more places than there may be tokens."""
    known = packing.row_of is None or packing.lengths is None
    return not known and not planned.may_ask(packing.flat.device)
