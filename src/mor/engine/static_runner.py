"""The runner of stages over static buffers: nothing it does waits for the device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mor.engine.batch import BatchLists, ForwardBatch, Piece, piece_lists, private_lists
from mor.engine.device import DeviceAttention
from mor.engine.pages import PageTables
from mor.engine.request import Request, Wave
from mor.engine.runner import Runner, ids_of, last_rows
from mor.engine.sampler import Choice
from mor.engine.stages import Stage
from mor.engine.static_sampler import StaticSampler
from mor.engine.view import KVView, PieceColumns, TokenColumns


class StaticRunner(Runner):
    """:class:`Runner` with a piece for every token, padded to a few sizes.

    A place that no token is in has the spare lane, and reads and writes the spare row of its page
    table, which is the spare page of the pool.
    """

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.boundaries.keep_always(self.lanes.hidden.device)
        device, most = self.lanes.hidden.device, self.lanes.count
        private, block = (self._idle(t) for t in (self.store.private, self.store.block))
        self._enter = Stage(self._entered, [*private, 0], most, device)
        self._tick = Stage(self._ticked, block, most, device)
        self._leave = Stage(self._left, private, most, device)
        # What the coda left, for the head; the spare place is behind all others.
        self._through = self.lanes.hidden.new_zeros((most + 1, self.config.hidden_size))
        self._head = Stage(self._read_out, [most], most, device)
        self._sampler = StaticSampler(self.store.private.spare, self.config.vocab_size, device)

    def enter(self, waves: Sequence[Wave]) -> Tensor:
        """See :meth:`Runner.enter`; prompts with embeddings go its way, not captured."""
        if any([wave.request.embedded is not None for wave in waves]):
            return super().enter(waves)
        self.boundaries.enter(waves, self.lanes.hidden.device)
        columns = self._private(waves)
        self._plan(self._enter, self.store.private, columns)
        return self._enter([*columns, ids_of(waves)])

    def tick(self, pieces: Sequence[Piece]) -> tuple[tuple[Piece, ...], Tensor]:
        """See :meth:`Runner.tick`."""
        store, spare = self.store, self.store.block.spare
        store.push()
        columns = self._columns(piece_lists(pieces, store.block), store.block)
        if store.shared:
            for place, depth in enumerate(columns[1]):
                if not store.writes(depth):
                    columns[4][place], columns[6][place] = 0, spare
        self._plan(self._tick, store.block, columns, mixed=store.origins is not None)
        return tuple(pieces), self._tick(columns)

    def leave(self, waves: Sequence[Wave]) -> tuple[Tensor | None, Tensor]:
        """See :meth:`Runner.leave`."""
        columns = self._private(waves)
        self._plan(self._leave, self.store.private, columns)
        hidden = self._leave(columns)
        last = last_rows(waves)
        if not last:
            return None, hidden
        return self._head([last]), hidden

    def choose(self, logits: Tensor, requests: Sequence[Request]) -> Choice:
        """See :meth:`Runner.choose`."""
        return self._sampler(logits, requests) or super().choose(logits, requests)

    def _plan(
        self, stage: Stage, table: PageTables, columns: Sequence[Sequence[int]], mixed: bool = False
    ) -> None:
        """Tell a form that wants to know how many places each query sees; padding sees its own."""
        if not (isinstance(self.attention, DeviceAttention) and self.attention.plans):
            return  # nothing is counted for who asks for nothing
        count = len(columns[0])
        seen = [slot + 1 for slot in columns[3]] + [1] * (stage.size(count) - count)
        pages = table.pages_of.host.shape[2]
        self.attention.plan_single(
            seen, *((1, table.max_tokens) if mixed else (table.pool.page_size, pages))
        )

    # What is captured ----------------------------------------------------------------------------

    def _entered(self, columns: Tensor) -> Tensor:
        batch = self._batch(self.store.private, columns)
        return self._start(batch, self.model.embed(columns[-1][None]))

    def _ticked(self, columns: Tensor) -> Tensor:
        return self._run(self._batch(self.store.block, columns, self.store.origins))

    def _left(self, columns: Tensor) -> Tensor:
        hidden = self._finish(self._batch(self.store.private, columns))[0]
        return self._through[: len(hidden)].copy_(hidden)

    def _read_out(self, columns: Tensor) -> Tensor:
        return self.model.head(self._through.index_select(0, columns[0]))

    # Columns -------------------------------------------------------------------------------------

    def _idle(self, table: PageTables) -> list[int]:
        # Position, depth, limit and places 0: it sees its own entry, and never goes on.
        return [0, 0, 0, 0, 0, self.lanes.count, table.spare, table.spare, 1, 1]

    def _private(self, waves: Sequence[Wave]) -> list[list[int]]:
        self.store.push()
        return self._columns(private_lists(waves, self.store.private), self.store.private)

    def _columns(self, lists: BatchLists, table: PageTables) -> list[list[int]]:
        """Each token is a piece of its own here."""
        first, (rows, seen, _, own_lengths, counts) = lists
        if not lists.single:
            rows = [row for row, count in zip(rows, counts, strict=True) for _ in range(count)]
            seen = [slot + 1 for slot in first[3]]
            own_lengths = [table.lengths[row] for row in first[6]]
        return [*first, rows, seen, own_lengths]

    def _batch(
        self, table: PageTables, columns: Tensor, origins: Tensor | None = None
    ) -> ForwardBatch:
        parts, size = columns.unbind(), columns.shape[1]
        tokens, (row, length, own_length) = TokenColumns(*parts[:7]), parts[7:10]
        pieces = PieceColumns(row, length, tokens.own_row, own_length, torch.ones_like(row))
        view = KVView(table, (tokens, pieces), (1,) * size, size, origins, width=table.max_tokens)
        return ForwardBatch((), view)
