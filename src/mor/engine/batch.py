"""The tokens that a stage runs over, laid end to end, and what attention must know of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

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
        pieces: whose tokens they are, in this order.
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
    return _batch(private_pieces(waves), store.private, None, None)


def private_pieces(waves: Sequence[Wave]) -> list[Piece]:
    """All tokens of ``waves``, for prelude or coda."""
    pieces = []
    for wave in waves:
        at, row = range(wave.start, wave.end), wave.request.row
        assert row is not None
        pieces.append(Piece(wave, range(len(at)), at, at, row, row))
    return pieces


def block_batch(pieces: Sequence[Piece], store: KVStore) -> ForwardBatch:
    """Tokens of mixed depths for the block, those that leave entries first."""
    store.push()
    if not store.shared:
        return _batch(pieces, store.block, None, store.origins)
    pieces = sorted(pieces, key=lambda piece: not store.writes(piece.wave.depth))
    writes = sum(len(p.places) for p in pieces if store.writes(p.wave.depth))
    return _batch(pieces, store.block, writes, store.origins)


def token_lists(pieces: Sequence[Piece]) -> tuple[list[int], ...]:
    """The columns of :class:`~mor.engine.view.TokenColumns` as lists."""
    if sum([len(piece.places) for piece in pieces]) == len(pieces):  # nearly always
        waves = [piece.wave for piece in pieces]
        return (
            [p.wave.start + p.places[0] for p in pieces],
            [wave.depth for wave in waves],
            [wave.request.limit if wave.cap is None else wave.cap for wave in waves],
            [p.slots[0] for p in pieces],
            [p.written[0] for p in pieces],
            [p.wave.lanes[p.places[0]] for p in pieces],
            [p.own_row for p in pieces],
        )
    names: tuple[list[int], ...] = tuple([] for _ in range(7))
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
    return names


def _batch(
    pieces: Sequence[Piece],
    table: PageTables,
    writes: int | None,
    origins: Tensor | None,
) -> ForwardBatch:
    """The first ``writes`` tokens leave entries; all where it is None."""
    names, lengths, many = token_lists(pieces), table.lengths, len(pieces)
    total = len(names[0])
    single = total == many
    counts = (1,) * many if single else tuple(len(p.places) for p in pieces)
    read, seen = [p.row for p in pieces], [p.slots[-1] + 1 for p in pieces]
    written = names[6] if single else [p.own_row for p in pieces]
    of_piece = (read, seen, written, [lengths[r] for r in written], counts)
    flat = Flat(to_int64(list(chain(*names, *of_piece)), table.table.device), total, many)
    kept = total if writes is None else writes
    view = KVView(table, flat, counts, kept, origins, slots=names[3])
    return ForwardBatch(tuple(pieces), view)
