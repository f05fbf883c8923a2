"""Where each stage of each request keeps its keys and values: the tables over the one pool.

A (request, depth) pair is a virtual sequence with a row of its own in the block's table, which
holds the tokens that ran this depth and nothing else (recursion-wise caching). Under recursive
sharing there is depth 0's row alone. Under ``propagate`` there is one row more, of tokens as they
ended: a depth reads it with its own entries in place of those of the tokens that it ran. Prelude
and coda hold the same tokens and share one row.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mor.config import MoRConfig
from mor.engine.memory import block_layers, pages_for, tokens_held
from mor.engine.mirror import Mirror
from mor.engine.pages import PagePool, PageTables
from mor.engine.prefix import Node, PrefixTree
from mor.engine.request import Request, Wave

Run = tuple[Sequence[int], Sequence[int], int, int]
"""Places of tokens in the row that they read, and in the row that they write; these rows."""


class KVStore:
    """Pool and tables for a number of resident requests.

    Args:
        config: the model's.
        num_pages, page_size: of the pool.
        residents: requests that may hold pages at a time.
        max_tokens: longest sequence.
        limit: depth cap of the engine.

    Attributes:
        private: layers of prelude and coda, one row per request.
        block: layers of the shared block, ``groups`` rows per request.
        depths: rows of them that are depths: R, or 1 where later depths read depth 0 or where all
            depths are one pass.
        groups: these, and the row of tokens as they ended where there is one.
        shared: whether later depths read depth 0 and leave no entries.
        ends: whether there is a row of tokens as they ended, each at its position.
        limit: depth cap of the engine.
        prefixes: what is kept of texts that were seen before.
        origins: [rows, tokens] place that every entry of the block's table takes in the row that
            is read, where depths read depth 0's row, or the row of tokens as they ended, with
            their own entries in place of some; else None.
    """

    def __init__(
        self,
        config: MoRConfig,
        num_pages: int,
        page_size: int,
        residents: int,
        max_tokens: int,
        limit: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.config = config
        self.pool = PagePool(
            num_pages, page_size, config.num_key_value_heads, config.head_dim, dtype, device
        )
        self.shared = config.kv_sharing == "recursive"
        self.ends = config.kv_sharing == "propagate"
        self.depths = 1 if self.shared or config.interleaved else limit
        self.groups = self.depths + self.ends
        layers = block_layers(config, limit)
        private = config.num_prelude_layers + config.num_coda_layers
        self.private = PageTables(self.pool, residents, private, max_tokens)
        self.block = PageTables(self.pool, residents * self.groups, layers, max_tokens)
        # A configuration's fields are slow to read, and admission asks for each request.
        caps, self.limit = range(limit + 1), limit
        self._per_column = [pages_for(config, 1, depth, page_size) for depth in caps]
        self._longest = [tokens_held(config, num_pages, depth, page_size) for depth in caps]
        self.prefixes = PrefixTree(self.pool, self.private, self.block, self.depths, self.ends)
        self._origins: Mirror | None = None
        if self.ends or config.kv_sharing == "recursive_update":
            self._origins = Mirror((residents * self.groups + 1, max_tokens), device)

    @property
    def origins(self) -> Tensor | None:
        """On the device; see above."""
        return None if self._origins is None else self._origins.there

    def push(self) -> None:
        """Bring the tables to the device as they stand."""
        for table in (self.private.pages_of, self.block.pages_of, self._origins):
            if table is not None:
                table.push()

    def row(self, request: Request, depth: int) -> int:
        """Row of the block's table that a token of ``request`` writes to at ``depth``."""
        assert request.row is not None
        last = self.depths - 1
        return request.row * self.groups + (depth if depth < last else last)

    def ended_row(self, request: Request) -> int:
        """Row of the block's table that holds the tokens of ``request`` as they ended."""
        assert request.row is not None
        return request.row * self.groups + self.depths

    def writes(self, depth: int) -> bool:
        """Whether a token leaves entries at ``depth``."""
        return depth == 0 or not self.shared

    def missing_to_enter(self, wave: Wave) -> int:
        """Pages that prelude and coda need for the tokens of ``wave``."""
        assert wave.request.row is not None
        missing = self.private.missing(wave.request.row, wave.end)
        if self.ends:
            missing += self.block.missing(self.ended_row(wave.request), wave.end)
        return missing

    def enter(self, wave: Wave) -> bool:
        """Take the pages that prelude and coda need for the tokens of ``wave``.

        And those of how they will end, where that is kept.

        Returns:
            False, and nothing is changed, where so many are not free.
        """
        assert wave.request.row is not None
        if not self.ends:
            return self.private.extend(wave.request.row, wave.end)
        if self.missing_to_enter(wave) > self.pool.free:  # both rows, or neither
            return False
        self.block.extend(self.ended_row(wave.request), wave.end)
        return self.private.extend(wave.request.row, wave.end)

    def missing_to_run(self, wave: Wave, count: int) -> int:
        """Pages that the next ``count`` tokens of ``wave`` need at its depth."""
        if not self.writes(wave.depth):
            return 0
        row = self.row(wave.request, wave.depth)
        return self.block.missing(row, self.block.lengths[row] + count)

    def run(self, wave: Wave, places: Sequence[int]) -> Run | None:
        """Take the pages that the tokens at ``places`` of ``wave`` need at its depth.

        Returns:
            The place of each token in the row that it reads, and in the row that it writes; and
            these rows. None, and nothing is changed, where so many pages are not free.
        """
        depth, block = wave.depth, self.block
        row = self.row(wave.request, depth)
        if depth and self.shared:
            first = [wave.first_slots[place] for place in places]
            return first, first, row, row
        before = block.lengths[row]
        after = before + len(places)
        if not block.extend(row, after):
            return None
        slots = range(before, after)
        if depth == 0:
            for place, slot in zip(places, slots, strict=True):
                wave.first_slots[place] = slot
        if self._origins is None:
            return slots, slots, row, row
        if self.ends:
            first = [wave.start + place for place in places]
        else:
            first = [wave.first_slots[place] for place in places]
        self._origins.host[row, before:after] = first
        self._origins.note((row,))
        read = self.ended_row(wave.request) if self.ends else self.row(wave.request, 0)
        return first, slots, read, row

    def adopt(self, request: Request, start: Node, goal: Node) -> None:
        """Let ``request``, which is at ``start``, read what is cached up to ``goal``.

        Its ``position_depths`` are known up to there.
        """
        assert request.row is not None
        self.prefixes.adopt(start, goal, request.row)
        if self._origins is None:
            return
        ran = request.position_depths[: goal.length]
        if not self.ends:  # places are those of depth 0's row
            ran = [depth for depth in ran if depth > 0]
        for depth, row in enumerate(self.block_rows(request.row)[: self.depths]):
            places = [place for place, deepest in enumerate(ran) if deepest > depth]
            self._origins.host[row, : len(places)] = places
            self._origins.note((row,))

    def lengths(self, request: Request) -> tuple[int, ...]:
        """Tokens in each row of ``request``: the private one, then those of the block."""
        assert request.row is not None
        block = self.block_rows(request.row)
        return (self.private.lengths[request.row], *(self.block.lengths[row] for row in block))

    def rewind(self, request: Request, lengths: Sequence[int], depths: Sequence[int] = ()) -> None:
        """Forget what ``request`` wrote since it had ``lengths``.

        Args:
            request: resident.
            lengths: of :meth:`lengths`.
            depths: recursions that the first tokens since then ran, which stay.
        """
        assert request.row is not None
        self.private.shrink(request.row, lengths[0] + len(depths))
        stay = self.prefixes.count_entries(depths)
        rows = self.block_rows(request.row)
        for row, length, more in zip(rows, lengths[1:], stay, strict=True):
            self.block.shrink(row, length + more)

    def release(self, request: Request) -> None:
        """Give back all that ``request`` reads."""
        assert request.row is not None
        self.private.release(request.row)
        for row in self.block_rows(request.row):
            self.block.release(row)

    def block_rows(self, row: int) -> range:
        """Rows of the block's table that belong to the resident in ``row``."""
        return range(row * self.groups, (row + 1) * self.groups)

    def owned(self, request: Request) -> int:
        """Pages that ``request`` reads."""
        assert request.row is not None
        own, first = self.private.columns[request.row], request.row * self.groups
        block = sum(self.block.columns[first : first + self.groups])
        return self.private.layers * own + self.block.layers * block

    def nbytes(self) -> int:
        """Bytes of the entries that requests read, the coda's of tokens on their way included.

        Those that several requests share count for each of them.
        """
        entries = self.private.layers * sum(self.private.lengths)
        entries += self.block.layers * sum(self.block.lengths)
        return entries * self.pool.entry_bytes()

    def most_pages(self, tokens: int, depth: int) -> int:
        """Pages that ``tokens`` tokens need at worst, when all of them run ``depth`` recursions."""
        return -(-tokens // self.pool.page_size) * self._per_column[depth]

    def longest(self, depth: int) -> int:
        """Most tokens that fit into the whole pool in the worst case."""
        return self._longest[depth]
