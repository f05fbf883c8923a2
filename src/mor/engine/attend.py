"""Attention of ragged virtual sequences over the paged pool: the fourth kind of ``attend``."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from mor.config import MoRConfig
from mor.engine.device import write
from mor.engine.view import KVView
from mor.model.attend.protocol import Attend
from mor.ops import native
from mor.ops.attention import slot_attention

PagedAttention = Callable[[Tensor, Tensor | None, Tensor | None, KVView, int], Tensor]
"""(query [N, H, d], key and value [writes, Hkv, d], view, layer of the table) -> [N, H, d].

Leaves the entries of the new tokens in their pages, and attends over the pages of each row.
"""


def padded_attention(
    query: Tensor, key: Tensor | None, value: Tensor | None, view: KVView, layer: int
) -> Tensor:
    """The plain form: every row's pages gathered into one padded batch, and a mask."""
    write(key, value, view, layer)
    slots, pool = view.read_slots(layer), view.table.pool
    keys, values = (found.transpose(1, 2) for found in pool.read(slots, query.dtype))
    queries = view.segments.pad(query).transpose(1, 2)
    mixed = slot_attention(queries, keys, values, view.segments.pad(view.tokens.slot))
    return view.segments.unpad(mixed.transpose(1, 2))


def row_attention(
    query: Tensor, key: Tensor | None, value: Tensor | None, view: KVView, layer: int
) -> Tensor:
    """The same, row by row: nothing is padded, so nothing is computed for padding.

    For the CPU, where one call more costs little beside keys and values as long as the longest
    row's, copied for every row.
    """
    write(key, value, view, layer)
    pool, slots = view.table.pool, view.read_slots(layer)
    mixed = []
    queries, places = query.split(view.counts), view.tokens.slot.split(view.counts)
    for row, (own, place) in enumerate(zip(queries, places, strict=True)):
        index = slots[row, : view.reach[row]]
        keys, values = (t.transpose(0, 1)[None] for t in pool.read(index, query.dtype))
        alone = own.transpose(0, 1)[None]
        if len(own) == 1:  # it sees all of them
            grouped = alone.shape[1] != keys.shape[1]
            found = F.scaled_dot_product_attention(alone, keys, values, enable_gqa=grouped)
        else:
            found = slot_attention(alone, keys, values, place[None])
        mixed.append(found[0].transpose(0, 1))
    return torch.cat(mixed)


def native_attention(
    query: Tensor, key: Tensor | None, value: Tensor | None, view: KVView, layer: int
) -> Tensor:
    """The same in one call of a kernel that reads the pages where they lie."""
    if not native.fits(query) or not native.holds(view.table.pool.keys):
        return row_attention(query, key, value, view, layer)
    return native.paged_attention(query, key, value, view.ragged, layer)


class PagedAttend(Attend):
    """Write the entries of new tokens into their pages, then attend over the pages of each row.

    Args:
        config: the model's.
        view: the tokens and their rows.
        first: the table's layer that belongs to the stage's layer 0.
        block: whether these are the shared block's layers.
        attention: the form of attention.
    """

    def __init__(
        self,
        config: MoRConfig,
        view: KVView,
        attention: PagedAttention,
        *,
        first: int = 0,
        block: bool = False,
    ) -> None:
        self.view, self.attention, self.first = view, attention, first
        # Several uses of a shared layer in one call, each with its own number: `sequence`.
        self.repeats = config if block and config.interleaved else None

    def _layer(self, layer: int) -> int:
        """Which layer of the page table belongs to the stage's ``layer``."""
        if self.repeats is not None and self.repeats.kv_sharing == "recursive":
            return self.repeats.shared_layer(layer)
        return self.first + layer

    def needs_kv(self, layer: int) -> bool | int:
        """How many of the tokens leave entries."""
        if self.repeats is not None and self.repeats.kv_sharing == "recursive":
            return self.repeats.repetition(layer) == 0
        total = len(self.view.tokens.slot)
        return self.view.writes if self.view.writes < total else True

    def pages(self) -> tuple[native.Ragged, int] | None:
        """The batch, and the table's layer for layer 0, for stages that run in one call.

        None where layers differ in more than their place in the table, or without kernels.
        """
        view = self.view
        if self.attention is not native_attention or self.repeats is not None:
            return None
        if not native.holds(view.table.pool.keys):
            return None
        return view.ragged, self.first

    def __call__(
        self, layer: int, query: Tensor, key: Tensor | None, value: Tensor | None
    ) -> Tensor:
        """[1, H, N, d] -> [1, H, N, d]; key and value [1, Hkv, writes, d]."""
        place = self._layer(layer)
        keys, values = (None if one is None else one[0].transpose(0, 1) for one in (key, value))
        mixed = self.attention(query[0].transpose(0, 1), keys, values, self.view, place)
        return mixed.transpose(0, 1)[None]
