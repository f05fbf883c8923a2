"""The paged pool of keys and values, and the page tables into it.

A page holds ``page_size`` tokens of **one layer**. Prelude, block and coda have different numbers
of layers, and how much the block needs hangs on the routing; with pages of one layer there is one
pool and one free list for all of them, and no split between the stages to guess. A table row then
has one list of pages per layer, all equally long, taken and given back together.

Rows may read the same page, and what is cached of texts that were seen before
(:mod:`mor.engine.prefix`) may keep pages that no row reads. Such pages count as free: they go when
others are wanted. A page that a row still writes to is that row's alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from mor.engine.entries import entry_bytes, has_scales, pack, raw, unpack
from mor.engine.mirror import Mirror


class PagePool:
    """Keys and values of all requests, allocated once.

    Attributes:
        keys, values: [num_pages * page_size, Hkv, head_dim]; slot = page * page_size + place.
        scales: of both where they are bytes, [num_pages * page_size, Hkv] each; else None.
        readers: rows that read each page.
        keepers: how often each page is kept for texts to come.
        evict: called with a number of pages when so many more have to be let go by their keepers.
    """

    def __init__(
        self,
        num_pages: int,
        page_size: int,
        kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.num_pages, self.page_size = num_pages, page_size
        # One more, which is nobody's: padding reads and writes there.
        shape = ((num_pages + 1) * page_size, kv_heads, head_dim)
        # On the CPU only what padding reads is filled: nobody reads what nobody wrote, and the
        # system gives memory page by page as it is written, so that an engine starts at once and
        # holds what it uses. A GPU's kernels may read behind a row: 0 x nan would be nan there.
        filled = slice(-page_size, None) if device.type == "cpu" else slice(None)
        self.keys = torch.empty(shape, dtype=dtype, device=device)
        self.values = torch.empty(shape, dtype=dtype, device=device)
        raw(self.keys)[filled] = raw(self.values)[filled] = 0
        self.scales: tuple[Tensor, Tensor] | None = None
        if has_scales(dtype):
            scales = torch.empty((2, *shape[:2]), device=device)
            scales[:, filled] = 0
            self.scales = (scales[0], scales[1])
        # Taken from the end: the page given back last is used first, while it is in the caches.
        self._free = list(range(num_pages - 1, -1, -1))
        self.readers, self.keepers = [0] * num_pages, [0] * num_pages
        self._idle = 0  # kept, and read by nobody
        self.evict: Callable[[int], None] | None = None
        self.peak = 0

    @property
    def free(self) -> int:
        """How many pages no row reads: what may be taken."""
        return len(self._free) + self._idle

    @property
    def used(self) -> int:
        """How many pages rows read."""
        return self.num_pages - self.free

    @property
    def kept(self) -> int:
        """How many pages are kept that no row reads."""
        return self._idle

    def take(self, count: int) -> list[int]:
        """Take ``count`` free pages; the caller has made sure that there are so many."""
        if count > self.free:
            raise RuntimeError(f"{count} pages wanted, {self.free} are free")
        if count > len(self._free):
            assert self.evict is not None
            self.evict(count - len(self._free))
        cut = len(self._free) - count
        taken = self._free[cut:]
        del self._free[cut:]
        for page in taken:
            self.readers[page] = 1
        self.peak = max(self.peak, self.used)
        return taken

    def share(self, pages: Iterable[int]) -> None:
        """One row more reads ``pages``, each of which is read or kept already."""
        for page in pages:
            self._idle -= self.readers[page] == 0
            self.readers[page] += 1
        self.peak = max(self.peak, self.used)

    def give(self, pages: Iterable[int]) -> None:
        """A row has done with ``pages``; those that nobody reads or keeps are free."""
        for page in pages:
            self.readers[page] -= 1
            if self.readers[page] == 0:
                if self.keepers[page]:
                    self._idle += 1
                else:
                    self._free.append(page)

    def keep(self, pages: Iterable[int]) -> None:
        """Keep ``pages``, which a row reads, when it has done with them."""
        for page in pages:
            self.keepers[page] += 1

    def let_go(self, pages: Iterable[int]) -> int:
        """Keep ``pages`` once less; how many of them became free by that."""
        before = len(self._free)
        for page in pages:
            self.keepers[page] -= 1
            if self.keepers[page] == 0 and self.readers[page] == 0:
                self._idle -= 1
                self._free.append(page)
        return len(self._free) - before

    def copy(self, pages: Sequence[int], to: Sequence[int]) -> None:
        """Copy all entries of ``pages`` into the pages ``to``."""
        shape = (self.num_pages + 1, self.page_size)
        for store in (self.keys, self.values, *(self.scales or ())):
            paged = raw(store).unflatten(0, shape)
            paged[list(to)] = paged[list(pages)]

    def free_pages(self) -> list[int]:
        """The pages that nobody reads or keeps, for :mod:`mor.engine.integrity`."""
        return list(self._free)

    def entry_bytes(self) -> int:
        """Bytes of key and value of one token in one layer."""
        return entry_bytes(self.keys.shape[1], self.keys.shape[2], self.keys.dtype)

    def nbytes(self) -> int:
        """Bytes of all keys and values of the pool."""
        return self.num_pages * self.page_size * self.entry_bytes()

    def write(self, slots: Tensor, key: Tensor, value: Tensor) -> None:
        """Keep key, value [..., Hkv, d] at ``slots`` [...]."""
        for place, (store, fresh) in enumerate(((self.keys, key), (self.values, value))):
            packed, scales = pack(fresh, store.dtype)
            raw(store)[slots] = raw(packed)
            if self.scales is not None and scales is not None:
                self.scales[place][slots] = scales

    def read(self, slots: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Keys and values [..., Hkv, d] at ``slots`` [...], in ``dtype``."""
        scales = [None, None] if self.scales is None else [own[slots] for own in self.scales]
        key, value = (
            unpack(raw(store)[slots].view(store.dtype), own, dtype)
            for store, own in zip((self.keys, self.values), scales, strict=True)
        )
        return key, value


class PageTables:
    """Which pages hold the tokens of each row: a request, or a request at one depth.

    Args:
        pool: where pages come from.
        rows: so many rows.
        layers: layers that share a row's tokens; each has its own pages.
        max_tokens: the most tokens a row may hold.

    Attributes:
        pages_of: [rows, layers, columns] page numbers, of the host and on the pool's device.
        lengths: tokens written, by row.
        spare: a row behind all others, whose pages are the spare one.
        columns: pages per layer, by row.
        room: tokens that fit into these, by row.
    """

    def __init__(self, pool: PagePool, rows: int, layers: int, max_tokens: int) -> None:
        self.pool, self.layers, self.max_tokens = pool, layers, max_tokens
        width = -(-max_tokens // pool.page_size)
        device = pool.keys.device
        self.pages_of, self.spare = Mirror((rows + 1, layers, width), device), rows
        self.pages_of.host[rows] = pool.num_pages
        self.pages_of.note((rows,))
        self.lengths = [0] * rows
        self.columns = [0] * rows
        self.room = [0] * rows

    def missing(self, row: int, length: int) -> int:
        """Pages that ``row`` has to take before it can hold ``length`` tokens."""
        if length <= self.room[row]:  # nearly always
            return 0
        return self.layers * (-(-length // self.pool.page_size) - self.columns[row])

    def extend(self, row: int, length: int) -> bool:
        """Take the missing pages and count ``length`` tokens as written.

        Returns:
            False, and nothing is changed, where so many pages are not free.
        """
        if length > self.room[row]:
            old, new = self.columns[row], -(-length // self.pool.page_size)
            if (missing := self.layers * (new - old)) > self.pool.free:
                return False
            pages = self.pool.take(missing)
            self.pages_of.host[row, :, old:new].flat[:] = pages  # by layer, then by column
            self.pages_of.note((row,))
            self.columns[row], self.room[row] = new, new * self.pool.page_size
        self.lengths[row] = length
        return True

    def owned(self, row: int) -> list[int]:
        """Numbers of all pages that ``row`` reads."""
        return self.pages_of.host[row, :, : self.columns[row]].ravel().tolist()

    def release(self, row: int) -> None:
        """Give back what ``row`` reads."""
        if self.columns[row]:
            self.pool.give(self.owned(row))
        self.columns[row] = self.lengths[row] = self.room[row] = 0

    def shrink(self, row: int, length: int) -> None:
        """Forget what ``row`` holds behind ``length`` tokens; give back pages that hold no other.

        Only what it has written itself, on pages that nobody else reads.
        """
        columns = -(-length // self.pool.page_size)
        if columns < self.columns[row]:
            self.pool.give(self.pages_of.host[row, :, columns : self.columns[row]].ravel().tolist())
            self.columns[row], self.room[row] = columns, columns * self.pool.page_size
        self.lengths[row] = length

    def pages(self, row: int, first: int, end: int) -> list[list[int]]:
        """Pages of ``row`` in columns ``first`` to ``end``, by column and layer."""
        return self.pages_of.host[row, :, first:end].T.tolist()

    def adopt(self, row: int, first: int, columns: Sequence[Sequence[int]], length: int) -> None:
        """Let ``row`` read pages of others.

        Args:
            row: holds the same tokens as these up to column ``first``.
            first: its columns from there on are replaced.
            columns: pages by column and layer.
            length: tokens that it holds then. Where they end within a page, the row gets a copy of
                that page: it will write there.
        """
        pages = [page for column in columns for page in column]
        self.pool.share(pages)
        own = self.pages_of.host[row, :, first : self.columns[row]]
        self.pool.give(own.ravel().tolist())
        end = first + len(columns)
        self._put(row, first, columns)
        self.columns[row], self.lengths[row] = end, length
        self.room[row] = end * self.pool.page_size
        if length % self.pool.page_size:
            last = list(columns[-1]) if columns else self.pages(row, end - 1, end)[0]
            copied = self.pool.take(len(last))
            self.pool.copy(last, copied)
            self._put(row, end - 1, [copied])
            self.pool.give(last)

    def _put(self, row: int, first: int, columns: Sequence[Sequence[int]]) -> None:
        if columns and self.layers:
            self.pages_of.host[row, :, first : first + len(columns)] = np.array(columns).T
            self.pages_of.note((row,))

    @property
    def table(self) -> Tensor:
        """[rows, layers, columns] page numbers, int64, on the pool's device."""
        return self.pages_of.there

    def slots(self, rows: Tensor, places: Tensor) -> Tensor:
        """Pool slots [N, layers] of token number ``places`` [N] of ``rows`` [N]."""
        size = self.pool.page_size
        return self.table[rows, :, places // size] * size + (places % size)[:, None]
