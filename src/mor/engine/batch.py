"""The tokens that a stage runs over, laid end to end, and what attention must know of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, NamedTuple

from torch import Tensor

from mor.engine.mirror import to_int64
from mor.engine.pages import PageTables
from mor.engine.request import Wave
from mor.engine.store import KVStore
from mor.engine.view import Flat, KVView


@dataclass(eq=False, slots=True)  # not frozen: some are made for every token, and that costs
class Piece:
    """Tokens of one wave that run a stage now.

    Attributes:
        wave: whose.
        places: which of its tokens, ascending.
        slots: place of each among the tokens of the table row that it reads.
        written: place of each in the row that it writes.
        row, own_row: the table rows that it reads and writes.
    """

    wave: Wave
    places: Sequence[int]
    slots: Sequence[int]
    written: Sequence[int]
    row: int
    own_row: int


@dataclass(frozen=True)
class ForwardBatch:
    """N tokens of any requests and depths as a run [1, N].

    Attributes:
        pieces: whose tokens they are, in this order; none for prelude and coda.
        view: the keys and values they meet, and the columns of the tokens.
    """

    pieces: tuple[Piece, ...]
    view: KVView

    @property
    def lanes(self) -> Tensor:
        """[N] where the streams of the tokens are kept."""
        return self.view.tokens.lane

    @property
    def positions(self) -> Tensor:
        """[1, N] positions in their sequences."""
        return self.view.tokens.position[None]

    @property
    def depths(self) -> Tensor:
        """[1, N] depths that run next."""
        return self.view.tokens.depth[None]

    @property
    def limits(self) -> Tensor:
        """[1, N] depth caps."""
        return self.view.tokens.limit[None]


def private_batch(waves: Sequence[Wave], store: KVStore) -> ForwardBatch:
    """All tokens of ``waves``, for prelude or coda: a token's place is its position."""
    store.push()
    return _batch((), private_lists(waves, store.private), store.private)


def block_batch(pieces: Sequence[Piece], store: KVStore) -> ForwardBatch:
    """Tokens of mixed depths for the block, those that leave entries first."""
    store.push()
    writes = None
    if store.shared:
        pieces = sorted(pieces, key=lambda piece: not store.writes(piece.wave.depth))
        writes = sum(len(p.places) for p in pieces if store.writes(p.wave.depth))
    return _batch(pieces, piece_lists(pieces, store.block), store.block, writes, store.origins)


class BatchLists(NamedTuple):
    """The columns of a batch on the host.

    Attributes:
        tokens: 7 lists of N, those of :class:`~mor.engine.view.TokenColumns`.
        pieces: 5 lists of S, those of :class:`~mor.engine.view.PieceColumns`.
    """

    tokens: tuple[list[int], ...]
    pieces: tuple[list[int], ...]

    @property
    def single(self) -> bool:
        """Whether every piece is one token."""
        return len(self.tokens[0]) == len(self.pieces[0])


def private_lists(waves: Sequence[Wave], table: PageTables) -> BatchLists:
    """All tokens of ``waves``, for prelude or coda."""
    if any([wave.end - wave.start != 1 for wave in waves]):
        return piece_lists(_private_pieces(waves), table)
    starts = [wave.start for wave in waves]
    rows: list[Any] = [wave.request.row for wave in waves]
    limits, lanes = [wave.limit for wave in waves], [wave.lanes[0] for wave in waves]
    depths = [wave.depth for wave in waves]
    return _single((starts, depths, limits, starts, starts, lanes, rows), rows, table)


def piece_lists(pieces: Sequence[Piece], table: PageTables) -> BatchLists:
    """The tokens of ``pieces``, end to end."""
    if sum([len(piece.places) for piece in pieces]) == len(pieces):  # nearly always
        waves = [piece.wave for piece in pieces]
        names: tuple[list[int], ...] = (
            [p.wave.start + p.places[0] for p in pieces],
            [wave.depth for wave in waves],
            [wave.limit for wave in waves],
            [p.slots[0] for p in pieces],
            [p.written[0] for p in pieces],
            [p.wave.lanes[p.places[0]] for p in pieces],
            [p.own_row for p in pieces],
        )
        return _single(names, [p.row for p in pieces], table)
    names = tuple([] for _ in range(7))
    position, depth, limit, slot, written, lane, own_row = names
    for piece in pieces:
        wave, places = piece.wave, piece.places
        count = len(places)
        start, lanes = wave.start, wave.lanes
        position.extend(map(start.__add__, places))
        depth.extend([wave.depth] * count)
        limit.extend([wave.limit] * count)
        slot.extend(piece.slots)
        written.extend(piece.written)
        lane.extend(map(lanes.__getitem__, places))
        own_row.extend([piece.own_row] * count)
    rows, own = [p.row for p in pieces], [p.own_row for p in pieces]
    seen, counts = [p.slots[-1] + 1 for p in pieces], [len(p.places) for p in pieces]
    return BatchLists(names, (rows, seen, own, [table.lengths[row] for row in own], counts))


def _single(names: tuple[list[int], ...], rows: list[int], table: PageTables) -> BatchLists:
    lengths, own = table.lengths, names[6]
    seen = [slot + 1 for slot in names[3]]
    return BatchLists(names, (rows, seen, own, [lengths[row] for row in own], [1] * len(rows)))


def _private_pieces(waves: Sequence[Wave]) -> list[Piece]:
    pieces = []
    for wave in waves:
        at, row = range(wave.start, wave.end), wave.request.row
        assert row is not None
        pieces.append(Piece(wave, range(len(at)), at, at, row, row))
    return pieces


def _batch(
    pieces: Sequence[Piece],
    lists: BatchLists,
    table: PageTables,
    writes: int | None = None,
    origins: Tensor | None = None,
) -> ForwardBatch:
    """The first ``writes`` tokens leave entries; all where it is None."""
    names, of_pieces = lists
    total, counts = len(names[0]), of_pieces[4]
    numbers = to_int64(list(chain(*names, *of_pieces)), table.table.device)
    kept = total if writes is None else writes
    view = KVView(
        table, Flat(numbers, total, len(counts)), tuple(counts), kept, origins, slots=names[3]
    )
    return ForwardBatch(tuple(pieces), view)
