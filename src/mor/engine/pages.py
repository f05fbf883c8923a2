"""The paged pool of keys and values, and the page tables into it.

A page holds ``page_size`` tokens of **one layer**. Prelude, block and coda have different numbers
of layers, and how much the block needs hangs on the routing; with pages of one layer there is one
pool and one free list for all of them, and no split between the stages to guess. A table row then
has one list of pages per layer, all equally long, taken and given back together.
"""

from __future__ import annotations

import torch
from torch import Tensor


class PagePool:
    """Keys and values of all requests, allocated once.

    Attributes:
        keys, values: [num_pages * page_size, Hkv, head_dim]; slot = page * page_size + place.
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
        shape = (num_pages * page_size, kv_heads, head_dim)
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)
        # Taken from the end: the page given back last is used first, while it is in the caches.
        self._free = list(range(num_pages - 1, -1, -1))
        self.peak = 0

    @property
    def free(self) -> int:
        """How many pages no row owns."""
        return len(self._free)

    @property
    def used(self) -> int:
        """How many pages rows own."""
        return self.num_pages - len(self._free)

    def take(self, count: int) -> list[int]:
        """Take ``count`` free pages; the caller has made sure that there are so many."""
        if count > len(self._free):
            raise RuntimeError(f"{count} pages wanted, {len(self._free)} are free")
        cut = len(self._free) - count
        taken = self._free[cut:]
        del self._free[cut:]
        self.peak = max(self.peak, self.used)
        return taken

    def give(self, pages: list[int]) -> None:
        """Give ``pages`` back to the free ones."""
        self._free.extend(pages)

    def free_pages(self) -> list[int]:
        """The free pages, for :mod:`mor.engine.integrity`."""
        return list(self._free)

    def entry_bytes(self) -> int:
        """Bytes of key and value of one token in one layer."""
        return 2 * self.keys[0].numel() * self.keys.element_size()

    def nbytes(self) -> int:
        """Bytes of all keys and values of the pool."""
        return self.keys.nbytes + self.values.nbytes


class PageTables:
    """Which pages hold the tokens of each row: a request, or a request at one depth.

    Args:
        pool: where pages come from.
        rows: so many rows.
        layers: layers that share a row's tokens; each has its own pages.
        max_tokens: the most tokens a row may hold.

    Attributes:
        table: [rows, layers, columns] page numbers, int64, on the pool's device.
        lengths: tokens written, by row.
        columns: pages per layer owned, by row.
        room: tokens that fit into these, by row.
    """

    def __init__(self, pool: PagePool, rows: int, layers: int, max_tokens: int) -> None:
        self.pool, self.layers, self.max_tokens = pool, layers, max_tokens
        width = -(-max_tokens // pool.page_size)
        device = pool.keys.device
        self.table = torch.zeros((rows, layers, width), dtype=torch.long, device=device)
        self.lengths = [0] * rows
        self.columns = [0] * rows
        self.room = [0] * rows

    def missing(self, row: int, length: int) -> int:
        """Pages that ``row`` has to take before it can hold ``length`` tokens."""
        if length <= self.room[row]:  # nearly always
            return 0
        return self.layers * (-(-length // self.pool.page_size) - self.columns[row])

    def extend(self, row: int, length: int) -> None:
        """Take the missing pages and count ``length`` tokens as written."""
        if length > self.room[row]:
            old, new = self.columns[row], -(-length // self.pool.page_size)
            pages = torch.tensor(self.pool.take(self.missing(row, length)), dtype=torch.long)
            self.table[row, :, old:new] = pages.view(self.layers, new - old).to(self.table.device)
            self.columns[row], self.room[row] = new, new * self.pool.page_size
        self.lengths[row] = length

    def owned(self, row: int) -> list[int]:
        """Numbers of all pages that ``row`` owns."""
        return self.table[row, :, : self.columns[row]].flatten().tolist()

    def release(self, row: int) -> None:
        """Give back what ``row`` owns."""
        if self.columns[row]:
            self.pool.give(self.owned(row))
        self.columns[row] = self.lengths[row] = self.room[row] = 0

    def slots(self, rows: Tensor, places: Tensor) -> Tensor:
        """Pool slots [N, layers] of token number ``places`` [N] of ``rows`` [N]."""
        size = self.pool.page_size
        return self.table[rows, :, places // size] * size + (places % size)[:, None]
