"""The tokens that a stage runs over, laid end to end, and what attention must know of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, chain
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mor.engine.mirror import to_int64
from mor.engine.pages import PageTables
from mor.engine.request import Wave
from mor.engine.store import KVStore
from mor.ops.native import Ragged
from mor.ops.segments import Segments


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


class TokenColumns(NamedTuple):
    """What a stage has to know of each of its N tokens; every column is int64 [N].

    Attributes:
        position: in its sequence.
        depth: that runs next.
        limit: depth cap.
        slot: place of its own entry in the row that it reads; it sees places 0..slot.
        written: place in the row that it is written to.
        lane: where its stream is kept.
        own_row: table row that it is written to.
    """

    position: Tensor
    depth: Tensor
    limit: Tensor
    slot: Tensor
    written: Tensor
    lane: Tensor
    own_row: Tensor


class PieceColumns(NamedTuple):
    """What attention has to know of each of S pieces; every column is int64 [S].

    Attributes:
        row, length: table row that is read, and the tokens in it, the new ones included.
        own_row, own_length: the same of the row that takes new entries.
        size: tokens of the piece.
    """

    row: Tensor
    length: Tensor
    own_row: Tensor
    own_length: Tensor
    size: Tensor


@dataclass(frozen=True)
class KVView:
    """Ragged virtual sequences: S pieces of N tokens, each over one row of a page table.

    Attributes:
        table: the page table.
        tokens: columns of the N tokens.
        pieces: columns of the S pieces.
        counts: tokens of each piece.
        writes: the first so many tokens leave entries.
        origins: [rows, tokens] where rows are read with the entries of their own row in place of
            some: which places these take; else None.
        width: places of a row that are looked at, whatever the lengths, so that none is asked for.
        slots: of the N tokens, as the host has them; None where it would have to ask.
    """

    table: PageTables
    tokens: TokenColumns
    pieces: PieceColumns
    counts: tuple[int, ...]
    writes: int
    origins: Tensor | None = None
    width: int | None = None
    slots: Sequence[int] | None = None

    @cached_property
    def segments(self) -> Segments:
        """The pieces as runs within the N tokens."""
        return Segments(tuple(range(len(self.counts))), self.counts, self.pieces.row.device)

    @cached_property
    def reach(self) -> list[int]:
        """How many tokens of its row each piece sees: queries ascend, so its last one decides."""
        return [self.seen[end - 1] for end in accumulate(self.counts)]

    @cached_property
    def seen(self) -> list[int]:
        """How many tokens of its row each query sees."""
        slots = self.tokens.slot.tolist() if self.slots is None else self.slots
        return [slot + 1 for slot in slots]

    @cached_property
    def longest(self) -> int:
        """Most tokens of one piece."""
        return max(self.counts)

    @property
    def tail(self) -> bool:
        """Whether every piece stands at the end of what it sees, token after token."""
        return self.longest == 1 or (self.origins is None and self.writes == sum(self.counts))

    @cached_property
    def used(self) -> Tensor:
        """int32 [N], how many tokens of its row each query sees."""
        return (self.tokens.slot + 1).int()

    @cached_property
    def starts(self) -> Tensor:
        """int32 [S + 1], the first of each piece's tokens, and their number."""
        return F.pad(self.pieces.size.cumsum(0), (1, 0)).int()

    @cached_property
    def page_rows(self) -> Tensor:
        """int32 [layers, S, columns], the pages that each piece reads."""
        found = self.table.table.index_select(0, self.pieces.row)
        return found.transpose(0, 1).int().contiguous()

    @cached_property
    def ragged(self) -> Ragged:
        """The same for the kernels."""
        pool, tokens, pieces = self.table.pool, self.tokens, self.pieces
        mixed = None
        if self.origins is not None:
            mixed = (pieces.own_row, pieces.own_length, self.origins)
        return Ragged(
            pool.keys, pool.values, self.table.table, pool.page_size, tokens.own_row,
            tokens.written, tokens.slot, pieces.row, pieces.size, pool.scales, mixed,
        )  # fmt: skip

    @cached_property
    def write_slots(self) -> Tensor:
        """[writes, layers] where in the pool the entries go."""
        return self.table.slots(
            self.tokens.own_row[: self.writes], self.tokens.written[: self.writes]
        )

    def _places(self, lengths: Tensor) -> Tensor:
        """[S, longest] 0, 1, 2 ... of each row.

        Behind a row's last token the last one is repeated: a real entry of its own, whatever pages
        that nobody owns may hold.
        """
        longest = int(lengths.max()) if self.width is None else self.width
        places = torch.arange(longest, device=lengths.device)
        return torch.minimum(places[None], lengths[:, None] - 1)

    @cached_property
    def _read(self) -> Tensor:
        return self._places(self.pieces.length)

    @cached_property
    def _own(self) -> Tensor:
        return self._places(self.pieces.own_length)

    def read_slots(self, layer: int) -> Tensor:
        """[S, longest] pool slots of every row's tokens in one layer of the table."""
        slots = self._slots(self.pieces.row, self._read, layer)
        if self.origins is None:
            return slots
        own = self.pieces.own_row
        taken = self.origins[own].gather(1, self._own)
        return slots.scatter(1, taken, self._slots(own, self._own, layer))

    def _slots(self, rows: Tensor, places: Tensor, layer: int) -> Tensor:
        size = self.table.pool.page_size
        return self.table.table[rows, layer].gather(1, places // size) * size + places % size


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
    return _batch(private_pieces(waves), store.private, sum(map(len, waves)), None)


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
    if store.shared:
        pieces = sorted(pieces, key=lambda piece: not store.writes(piece.wave.depth))
    writes = sum(len(p.places) for p in pieces if store.writes(p.wave.depth))
    return _batch(pieces, store.block, writes, store.origins)


def token_lists(pieces: Sequence[Piece]) -> tuple[list[int], ...]:
    """The columns of :class:`TokenColumns` as lists."""
    if all(len(piece.places) == 1 for piece in pieces):  # nearly always
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
    pieces: Sequence[Piece], table: PageTables, writes: int, origins: Tensor | None
) -> ForwardBatch:
    counts = tuple(len(p.places) for p in pieces)
    names, lengths = token_lists(pieces), table.lengths
    read, written = [p.row for p in pieces], [p.own_row for p in pieces]
    of_piece = (
        read, [lengths[r] for r in read], written, [lengths[r] for r in written], counts,
    )  # fmt: skip
    flat = to_int64(list(chain(*names, *of_piece)), table.table.device)
    total, parts = len(names[0]), len(names)
    tokens = TokenColumns(*flat[: parts * total].view(parts, total).unbind())
    columns = PieceColumns(*flat[parts * total :].view(-1, len(pieces)).unbind())
    view = KVView(table, tokens, columns, counts, writes, origins, slots=names[3])
    return ForwardBatch(tuple(pieces), view)
