"""Keys and values during one forward pass without a cache: training and plain evaluation.

The recursion asks :class:`RowKV` for one
:class:`~mor.model.attend.protocol.Attend` per stage and depth.
:class:`mor.model.attend.cached.CacheKV` answers the same calls with a cache behind it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mor.config import MoRConfig
from mor.model.attend.among import (
    CausalAttend,
    FullAttend,
    PaddedAttend,
)
from mor.model.attend.protocol import KV, Attend
from mor.model.attend.shared import PropagatedAttend, Shared, SharedAttend, make_room
from mor.ops import planned
from mor.ops.attention import SharedRuns, SharedSegments
from mor.ops.compaction import Packing
from mor.ops.full_attention import Meeting
from mor.ops.prefix import Walk
from mor.ops.segments import Runs, Segments


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
        if config.kv_sharing == "propagate":
            self.first_segments = self.everybody.segments

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
            return self.kind(Runs(packing.row_of, packing.valid[0], *self._most()))
        runs = packing.row_of if self.runs is None else self.runs[packing.flat.flatten()]
        return self.kind(None if runs is None else Segments.of(runs))

    @property
    def run_lengths(self) -> Sequence[int] | None:
        """As :meth:`KV.run_lengths`: asked about at the door."""
        known = self.everybody.segments
        return known.lengths if isinstance(known, Segments) else None

    def _most(self) -> tuple[int, int]:
        """How many runs there are, and tokens in the longest, at most: asked about at the door."""
        known = self.everybody.segments
        if not isinstance(known, Segments):
            return self.shape
        return known.names[-1] + 1, known.longest

    def depth(self, depth: int, packing: Packing | None) -> Attend:
        """Active tokens among themselves, or over those of depth 0 under sharing."""
        own = self._among(packing)
        if self.config.kv_sharing == "none":
            return own
        if self.config.kv_sharing == "propagate":
            if packing is None:
                return own
            reach = self._reach(packing, own.segments)
            return PropagatedAttend(self.config, self.store, self.shape, reach)
        if depth == 0:
            self.first, self.first_segments = packing, own.segments
        shared = None if packing is self.first else self._reach(packing, own.segments)
        return SharedAttend(self.config, self.store, own, shared)

    def publish(
        self, entries: list[tuple[Tensor, Tensor]], depth: int, packing: Packing | None
    ) -> None:
        """As :meth:`KV.publish`; ``depth`` does not matter, since depths come one after another."""
        for name, (key, value) in enumerate(entries):
            if packing is None:
                self.store[name] = key, value
                continue
            left = Shared(packing.flat.flatten(), None)
            keys, values = self.store.get(name) or make_room(self.shape, key, value)
            self.store[name] = left.refresh(keys, key), left.refresh(values, value)

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
