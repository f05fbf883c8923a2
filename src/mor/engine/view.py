"""What attention has to know of a batch: whose its tokens are, where entries lie, who sees what."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mor.engine.pages import PageTables
from mor.ops.native import Ragged
from mor.ops.segments import Segments


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
        row, length: table row that is read, and how many places of it the last token sees.
        own_row, own_length: row that takes new entries, and all that are in it, these included.
        size: tokens of the piece.
    """

    row: Tensor
    length: Tensor
    own_row: Tensor
    own_length: Tensor
    size: Tensor


class Flat(NamedTuple):
    """Both kinds of columns end to end in one tensor, as kernels take them.

    Attributes:
        numbers: int64 [7 N + 5 S].
        tokens, pieces: N and S.
    """

    numbers: Tensor
    tokens: int
    pieces: int

    def taken(self) -> tuple[TokenColumns, PieceColumns]:
        """The columns, each as a view."""
        places = 7 * self.tokens
        own = self.numbers[:places].view(7, self.tokens)
        rest = self.numbers[places:].view(5, self.pieces)
        return TokenColumns(*own.unbind()), PieceColumns(*rest.unbind())


def block_pages(table: PageTables, origins: Tensor | None) -> Ragged:
    """A page table for the kernels, with tokens yet to come."""
    pool = table.pool
    none = torch.zeros(0, dtype=torch.long, device=pool.keys.device)
    mixed = None if origins is None else (none, none, origins)
    return Ragged(
        pool.keys, pool.values, table.table, pool.page_size, none, none, none, none, none,
        pool.scales, mixed,
    )  # fmt: skip


@dataclass(frozen=True)
class KVView:
    """Ragged virtual sequences: S pieces of N tokens, each over one row of a page table.

    Attributes:
        table: the page table.
        columns: of the N tokens and the S pieces.
        counts: tokens of each piece.
        writes: the first so many tokens leave entries.
        origins: [rows, tokens] where rows are read with the entries of their own row in place of
            some: which places these take; else None.
        width: places of a row that are looked at, whatever the lengths, so that none is asked for.
        slots: of the N tokens, as the host has them; None where it would have to ask.
    """

    table: PageTables
    columns: Flat | tuple[TokenColumns, PieceColumns]
    counts: tuple[int, ...]
    writes: int
    origins: Tensor | None = None
    width: int | None = None
    slots: Sequence[int] | None = None

    @cached_property
    def _taken(self) -> tuple[TokenColumns, PieceColumns]:
        return self.columns.taken() if isinstance(self.columns, Flat) else self.columns

    @property
    def tokens(self) -> TokenColumns:
        """Columns of the N tokens."""
        return self._taken[0]

    @property
    def pieces(self) -> PieceColumns:
        """Columns of the S pieces."""
        return self._taken[1]

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
        one_by_one = self.origins is None and self.writes == sum(self.counts)
        return self.longest == 1 or one_by_one

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
        mixed = slots.scatter(1, taken, self._slots(own, self._own, layer))
        return mixed.gather(1, self._read)  # behind the last token its own entry, too

    def _slots(self, rows: Tensor, places: Tensor, layer: int) -> Tensor:
        size = self.table.pool.page_size
        return self.table.table[rows, layer].gather(1, places // size) * size + places % size
