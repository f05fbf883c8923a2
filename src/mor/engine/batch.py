"""The tokens that a stage runs over, laid end to end, and what attention must know of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mor.engine.pages import PageTables
from mor.engine.request import Wave
from mor.engine.store import KVStore
from mor.ops.native import Ragged
from mor.ops.segments import Segments


@dataclass(frozen=True)
class Piece:
    """Tokens of one wave that run a stage now.

    Attributes:
        wave: whose.
        places: which of its tokens, ascending.
        slots: place of each among the tokens of the table row that it reads.
        written: place of each in the row that it writes.
    """

    wave: Wave
    places: Sequence[int]
    slots: Sequence[int]
    written: Sequence[int]


@dataclass(frozen=True)
class KVView:
    """Ragged virtual sequences: S pieces of N tokens, each over one row of a page table.

    Attributes:
        table: the page table.
        rows: [S] table row of each piece.
        lengths: [S] tokens in that row, the new ones included.
        slots: [N] place of each query's own entry in its row; it sees places 0..slot.
        counts: tokens of each piece.
        writes: the first so many tokens leave entries.
        own_rows, own_lengths, written: [S], [S], [N] the same of the row that takes new entries.
        origins: [rows, tokens] where rows are read with the entries of their own row in place of
            some: which places these take; else None.
    """

    table: PageTables
    rows: Tensor
    lengths: Tensor
    slots: Tensor
    counts: tuple[int, ...]
    writes: int
    own_rows: Tensor
    written: Tensor
    own_lengths: Tensor
    origins: Tensor | None = None

    @cached_property
    def segments(self) -> Segments:
        """The pieces as runs within the N tokens."""
        return Segments(tuple(range(len(self.counts))), self.counts, self.rows.device)

    @cached_property
    def reach(self) -> list[int]:
        """How many tokens of its row each piece sees: queries ascend, so its last one decides."""
        ends = self.count_of.cumsum(0) - 1
        return (self.slots[ends] + 1).tolist()

    @cached_property
    def count_of(self) -> Tensor:
        """[S] ``counts`` as a tensor."""
        return torch.tensor(self.counts, device=self.rows.device)

    @cached_property
    def own_row_of(self) -> Tensor:
        """[N] table row that each token is written to."""
        return self.own_rows.repeat_interleave(self.count_of)

    @cached_property
    def ragged(self) -> Ragged:
        """The same for the kernels."""
        pool = self.table.pool
        return Ragged(
            pool.keys, pool.values, self.table.table, pool.page_size, self.own_row_of,
            self.written.contiguous(), self.slots.contiguous(), self.rows, self.count_of,
        )  # fmt: skip

    def gathered(self, layer: int) -> Ragged:
        """For the kernels: rows of single entries, wherever each lies, in one of the layers."""
        pool, rows = self.table.pool, torch.arange(len(self.rows), device=self.rows.device)
        return Ragged(
            pool.keys, pool.values, self.read_slots(layer)[:, None].contiguous(), 1,
            rows.repeat_interleave(self.count_of), self.slots, self.slots.contiguous(), rows,
            self.count_of,
        )  # fmt: skip

    @cached_property
    def write_slots(self) -> Tensor:
        """[writes, layers] where in the pool the entries go."""
        return self.table.slots(self.own_row_of[: self.writes], self.written[: self.writes])

    @staticmethod
    def _places(lengths: Tensor) -> Tensor:
        """[S, longest] 0, 1, 2 ... of each row.

        Behind a row's last token the last one is repeated: a real entry of its own, whatever pages
        that nobody owns may hold.
        """
        places = torch.arange(int(lengths.max()), device=lengths.device)
        return torch.minimum(places[None], lengths[:, None] - 1)

    @cached_property
    def _read(self) -> Tensor:
        return self._places(self.lengths)

    @cached_property
    def _own(self) -> Tensor:
        return self._places(self.own_lengths)

    def read_slots(self, layer: int) -> Tensor:
        """[S, longest] pool slots of every row's tokens in one layer of the table."""
        slots = self._slots(self.rows, self._read, layer)
        if self.origins is None:
            return slots
        taken = self.origins[self.own_rows].gather(1, self._own)
        return slots.scatter(1, taken, self._slots(self.own_rows, self._own, layer))

    def _slots(self, rows: Tensor, places: Tensor, layer: int) -> Tensor:
        size = self.table.pool.page_size
        return self.table.table[rows, layer].gather(1, places // size) * size + places % size


@dataclass(frozen=True)
class ForwardBatch:
    """N tokens of any requests and depths as a run [1, N].

    Attributes:
        pieces: whose tokens they are, in this order.
        lanes: [N] where their streams are kept.
        positions, depths, limits: [1, N] position, depth that runs next, depth cap.
        view: the keys and values they meet.
    """

    pieces: tuple[Piece, ...]
    lanes: Tensor
    positions: Tensor
    depths: Tensor
    limits: Tensor
    view: KVView


def private_batch(waves: Sequence[Wave], store: KVStore) -> ForwardBatch:
    """All tokens of ``waves``, for prelude or coda: a token's place is its position."""
    own = [range(w.start, w.end) for w in waves]
    pieces = [Piece(w, range(len(w)), at, at) for w, at in zip(waves, own, strict=True)]
    rows = [w.request.row for w in waves]
    return _batch(pieces, store.private, rows, rows, sum(map(len, waves)), None)


def block_batch(pieces: Sequence[Piece], store: KVStore) -> ForwardBatch:
    """Tokens of mixed depths for the block, those that leave entries first."""
    ordered = sorted(pieces, key=lambda piece: not store.writes(piece.wave.depth))
    rows = [store.read_row(piece.wave.request, piece.wave.depth) for piece in ordered]
    own = [store.row(piece.wave.request, piece.wave.depth) for piece in ordered]
    writes = sum(len(p.places) for p in ordered if store.writes(p.wave.depth))
    return _batch(ordered, store.block, rows, own, writes, store.origins)


def longs(numbers: Sequence[Any], device: torch.device) -> Tensor:
    """A list, or a list of lists, as int64 in one copy; numpy reads lists many times faster."""
    return torch.from_numpy(np.array(numbers, dtype=np.int64)).to(device)


def _batch(
    pieces: Sequence[Piece],
    table: PageTables,
    rows: Sequence[int | None],
    own: Sequence[int | None],
    writes: int,
    origins: Tensor | None,
) -> ForwardBatch:
    device = table.table.device
    numbers = [
        [p.wave.start + place for p in pieces for place in p.places],
        [p.wave.depth for p in pieces for _ in p.places],
        [p.wave.request.limit for p in pieces for _ in p.places],
        [slot for p in pieces for slot in p.slots],
        [slot for p in pieces for slot in p.written],
        [p.wave.lanes[place] for p in pieces for place in p.places],
        [row or 0 for p, row in zip(pieces, own, strict=True) for _ in p.places],
    ]
    counts = tuple(len(p.places) for p in pieces)
    by_row = [
        rows,
        [table.lengths[r or 0] for r in rows],
        own,
        [table.lengths[r or 0] for r in own],
        counts,
    ]
    told, shapes = longs(numbers, device), longs(by_row, device)
    view = KVView(
        table, shapes[0], shapes[1], told[3], counts, writes, shapes[2], told[4], shapes[3], origins
    )
    # Properties of the view, known here without a kernel of the device's.
    vars(view).update(own_row_of=told[6], count_of=shapes[4])
    return ForwardBatch(tuple(pieces), told[5], told[0:1], told[1:2], told[2:3], view)
