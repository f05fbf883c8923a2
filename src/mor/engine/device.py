"""Forms of paged attention that take plain tensors on the device, as the engine's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from mor.config import MoRConfig
from mor.engine.pages import PagePool
from mor.engine.view import KVView
from mor.ops.paged import FlashInfer, Pages, PagesAttention, Rows
from mor.ops.paged.flashinfer import WORKSPACE, make_wrapper
from mor.ops.planned import explain_no_triton


def pages_of(pool: PagePool, size: int | None = None) -> Pages:
    """The pool as attention over pages wants it, in pages of ``size`` slots (None: its own)."""
    shape = (-1, pool.page_size if size is None else size)
    keys, values = pool.keys.unflatten(0, shape), pool.values.unflatten(0, shape)
    if pool.scales is None:
        return Pages(keys, values)
    return Pages(keys, values, *(own.unflatten(0, shape) for own in pool.scales))


def rows_of(view: KVView, layer: int) -> tuple[Rows, int | None]:
    """The rows of a batch in one layer of the table, and the size of their pages.

    None is the pool's own size. Where rows are read with entries of their own in place of some,
    each slot is a page.
    """
    size, table = None, view.page_rows[layer] if view.origins is None else None
    if table is None:
        size, table = 1, view.read_slots(layer).int()
    if view.longest == 1:
        return Rows(table, view.used), size
    return Rows(table, view.used, view.starts, view.longest, view.tail), size


def write(key: Tensor | None, value: Tensor | None, view: KVView, layer: int) -> None:
    """Leave entries of new tokens, if there are any, in their pages."""
    if key is None:
        return
    assert value is not None
    pool, slots = view.table.pool, view.write_slots[:, layer]
    if key.device.type == "cuda" and writes_in_one_kernel(pool, key):
        # Here: it compiles at the first call, and machines without Triton run the other form.
        from mor.ops.fused import fused_write

        fused_write(pool.keys, pool.values, slots, key, value)
    else:
        pool.write(slots, key, value)


def writes_in_one_kernel(pool: PagePool, key: Tensor) -> bool:
    """Whether entries are kept as they come, and kernels in Triton can run."""
    same = pool.scales is None and pool.keys.dtype == key.dtype
    return same and _has_triton(key.device, key.dtype)


@cache
def _has_triton(device: torch.device, dtype: torch.dtype) -> bool:
    """Asked once: every layer of every tick writes, and looking for a package takes time."""
    return explain_no_triton(device, dtype) is None


class DeviceAttention:
    """A form that waits for nothing, as a ``PagedAttention``.

    Attributes:
        name: of the form.
        attend: the form.
        plans: whether the host tells it lengths (:meth:`plan_single`) before each run.
    """

    plans = False

    def __init__(self, name: str, attend: PagesAttention) -> None:
        self.name, self.attend = name, attend

    def plan(self, view: KVView) -> None:
        """Called before each run over a batch, and before each replay of a captured one."""

    def plan_single(self, seen: Sequence[int], page_size: int, columns: int) -> None:
        """Called before each run of a static stage, whose rows have one query each.

        Args:
            seen: places of its row that each query sees, padding included.
            page_size, columns: of the page table.
        """

    def __call__(
        self, query: Tensor, key: Tensor | None, value: Tensor | None, view: KVView, layer: int
    ) -> Tensor:
        """Write, then attend: query [N, H, d] -> [N, H, d]."""
        write(key, value, view, layer)
        rows, size = rows_of(view, layer)
        return self.attend(query, pages_of(view.table.pool, size), rows, None)


class FlashInferAttention(DeviceAttention):
    """FlashInfer's form: the host tells it the lengths of each batch.

    Rows and queries are padded to powers of two, so that few wrappers are made. A batch that it was
    not told of is planned when its first layer comes; within a capture nothing can be planned, so
    whoever replays one calls :meth:`plan_single` before. Lengths are those that the host has.

    Args:
        config: the model's.
        dtype, device: of queries and pages.
        make: makes FlashInfer's wrapper.
        workspace: bytes that all wrappers share.
    """

    plans = True

    def __init__(
        self,
        config: MoRConfig,
        dtype: torch.dtype,
        device: torch.device,
        make: Callable[..., Any] = make_wrapper,
        workspace: int = WORKSPACE,
    ) -> None:
        self.name = "flashinfer"
        self.config, self.dtype, self.device, self.make = config, dtype, device, make
        self._workspace = torch.zeros(workspace, dtype=torch.uint8, device=device)
        self._made: dict[tuple[int, int, int, int], FlashInfer] = {}
        self._view: KVView | None = None
        self._own: FlashInfer | None = None
        self._single: dict[tuple[int, int, int], FlashInfer] = {}

    def plan(self, view: KVView) -> None:
        """Tell FlashInfer the lengths of ``view``; not within a capture."""
        rows, size = rows_of(view, 0)
        lengths, counts = list(view.reach), list(view.counts)
        if not rows.tail:
            rows, lengths, counts = rows.one_by_one(), list(view.seen), [1] * len(view.seen)
        page_size = view.table.pool.page_size if size is None else size
        self._own, self._view = self._tell(lengths, counts, page_size, rows.table.shape[1]), view

    def plan_single(self, seen: Sequence[int], page_size: int, columns: int) -> None:
        """See :meth:`DeviceAttention.plan_single`."""
        found = self._tell(list(seen), [1] * len(seen), page_size, columns)
        self._single[len(seen), page_size, columns] = found

    def _tell(
        self, lengths: list[int], counts: list[int], page_size: int, columns: int
    ) -> FlashInfer:
        """The wrapper for so many rows and queries, which knows these lengths now."""
        count, queries = len(lengths), sum(counts)
        room, asked = _power(count + 1), _power(queries)
        key = (room, asked, columns, page_size)
        if key not in self._made:
            config = self.config
            self._made[key] = FlashInfer(
                room, key[2], heads=config.num_attention_heads,
                kv_heads=config.num_key_value_heads, head_dim=config.head_dim,
                page_size=page_size, dtype=self.dtype, device=self.device,
                workspace=self._workspace, make=self.make,
            )  # fmt: skip
        padding = [0] * (room - count)
        self._made[key].plan(lengths + padding, [*counts, *padding[1:], asked - queries])
        return self._made[key]

    def __call__(
        self, query: Tensor, key: Tensor | None, value: Tensor | None, view: KVView, layer: int
    ) -> Tensor:
        """Write, then attend: query [N, H, d] -> [N, H, d]."""
        write(key, value, view, layer)
        rows, size = rows_of(view, layer)
        if view.width is not None:  # of a static stage, which may be a capture
            page_size = view.table.pool.page_size if size is None else size
            self._own = self._single[len(query), page_size, rows.table.shape[1]]
        elif self._view is not view:
            self.plan(view)
        assert self._own is not None
        rows = rows if rows.tail else rows.one_by_one()
        count, more = len(query), _power(len(query)) - len(query)
        table = _more(rows.table, self._own.rows - len(rows.table))
        padded = Rows(table, _more(rows.used, more))
        found = self._own(_more(query, more), pages_of(view.table.pool, size), padded)
        return found[:count]


def _power(count: int) -> int:
    """The smallest power of two that is at least ``count``."""
    return 1 << max(0, count - 1).bit_length()


def _more(tensor: Tensor, count: int) -> Tensor:
    """``tensor`` with ``count`` rows of zeros behind it."""
    return torch.cat((tensor, tensor.new_zeros((count, *tensor.shape[1:]))))
