"""What attention over pages is given: plain tensors on the device, of sizes that do not change.

Page tables, lengths and numbers of queries are tensors that a kernel reads where they lie. The host
knows only sizes, so that no call waits for the device, and a call that was captured in a CUDA graph
may be replayed over other numbers in the same tensors.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Pages(NamedTuple):
    """Keys and values of all requests.

    Attributes:
        keys, values: [pages, page_size, Hkv, d].
        key_scales, value_scales: [pages, page_size, Hkv] float32 where the entries are bytes (int8
            or float8_e4m3fn), which are multiplied by them; else None.
    """

    keys: Tensor
    values: Tensor
    key_scales: Tensor | None = None
    value_scales: Tensor | None = None


class Rows(NamedTuple):
    """Which queries read which pages: S rows, each over its own pages, with N queries in all.

    Attributes:
        table: [S, columns] int32, pages of each row; behind its last page any page of the pool.
        used: [N] int32, the first so many places of its row are what each query sees; 0: none, and
            its result is zeros.
        starts: [S + 1] int32, the row's queries are ``starts[s]..starts[s + 1] - 1``. None: N == S,
            one query for each row.
        longest: most queries of one row; known to the host.
        tail: whether a row's queries always stand at its last places, one after another, so that
            causal attention aligned at the row's end is the whole mask. True where ``starts`` is
            None.
    """

    table: Tensor
    used: Tensor
    starts: Tensor | None = None
    longest: int = 1
    tail: bool = True

    @property
    def offsets(self) -> Tensor:
        """[S + 1] int32, ``starts`` also where each row has one query."""
        if self.starts is not None:
            return self.starts
        return torch.arange(len(self.table) + 1, dtype=torch.int32, device=self.table.device)

    def one_by_one(self) -> Rows:
        """The same with a row for each query."""
        if self.starts is None:
            return self
        places = torch.arange(len(self.used), dtype=torch.int32, device=self.used.device)
        row = torch.searchsorted(self.starts, places, right=True, out_int32=True) - 1
        row = row.clamp(max=len(self.table) - 1)  # queries behind the last row see nothing
        return Rows(self.table.index_select(0, row), self.used)

    def reach(self) -> Tensor:
        """[S] int32, how many of its places each row's last query sees; 0 without queries."""
        if self.starts is None:
            return self.used
        last = self.starts[1:] - 1
        seen = self.used.index_select(0, last.clamp(min=0))
        return torch.where(last >= self.starts[:-1], seen, 0)


PagesAttention = Callable[[Tensor, Pages, Rows, float | None], Tensor]
"""(query [N, H, d], pages, rows, scale) -> [N, H, d]; a scale of None is ``d ** -0.5``.

A query that sees nothing gets zeros. What lies in pages or places that no query sees reaches
nobody. H may be any multiple of Hkv.
"""
