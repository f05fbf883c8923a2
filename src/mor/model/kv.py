"""Keys and values during one forward pass without a cache: training and plain evaluation.

The recursion asks :class:`RowKV` for one :class:`~mor.model.layers.Attend` per stage and depth.
:class:`mor.model.cached.CacheKV` answers the same calls with a cache behind it.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from mor.config import MoRConfig
from mor.model.layers import Attend
from mor.ops.attention import causal_attention, scattered_attention
from mor.ops.compaction import Packing


class KV(Protocol):
    """Where a forward pass keeps keys and values."""

    def prelude(self) -> Attend:
        """For the prelude's layers, over all tokens."""
        ...

    def depth(self, depth: int, packing: Packing | None) -> Attend:
        """For recursion ``depth``, over the tokens of ``packing`` (None for all)."""
        ...

    def coda(self) -> Attend:
        """For the coda's layers, over all tokens."""
        ...


class CausalAttend:
    """Own keys and values of these rows only: recursion-wise caching (paper 2.3)."""

    def needs_kv(self, layer: int) -> bool:
        """Always."""
        return True

    def __call__(
        self, layer: int, query: Tensor, key: Tensor | None, value: Tensor | None
    ) -> Tensor:
        """Plain causal attention within each row."""
        assert key is not None
        assert value is not None
        return causal_attention(query, key, value)


class SharedAttend:
    """Recursive KV sharing: the first use of a shared layer stores, later uses read (paper 2.3).

    Args:
        config: for which unrolled layer uses which shared layer.
        store: keys and values of first uses, by shared layer.
        slots: [A, M] place of each query in the stored rows, or None for all tokens in order.
        rows: [A] stored row of each query row, or None for all rows in order.
    """

    def __init__(
        self,
        config: MoRConfig,
        store: dict[int, tuple[Tensor, Tensor]],
        slots: Tensor | None,
        rows: Tensor | None,
        valid: Tensor | None,
    ) -> None:
        self.config, self.store = config, store
        self.slots, self.rows, self.valid = slots, rows, valid
        self.update = config.kv_sharing == "recursive_update"

    def _first(self, layer: int) -> bool:
        return self.config.repetition(layer) == 0

    def needs_kv(self, layer: int) -> bool:
        """Only a first use, unless active tokens refresh their entries."""
        return self._first(layer) or self.update

    def __call__(
        self, layer: int, query: Tensor, key: Tensor | None, value: Tensor | None
    ) -> Tensor:
        """Causal attention of the queries over the stored rows."""
        shared = self.config.shared_layer(layer)
        if self._first(layer):
            assert key is not None
            assert value is not None
            # Kept from the first pass: checkpointing runs this again in the backward pass.
            self.store.setdefault(shared, (key, value))
            return causal_attention(query, key, value)
        keys, values = self.store[shared]
        if self.rows is not None:
            keys, values = keys[self.rows], values[self.rows]
        if self.slots is None:
            if self.update:
                assert key is not None
                assert value is not None
                keys, values = key, value
            return causal_attention(query, keys, values)
        if self.update:
            assert key is not None
            assert value is not None
            keys, values = self._refresh(keys, key), self._refresh(values, value)
        return scattered_attention(query, keys, values, self.slots)

    def _refresh(self, stored: Tensor, fresh: Tensor) -> Tensor:
        """Stored rows with the active tokens' entries replaced, for this depth only."""
        assert self.slots is not None
        index = self.slots[:, None, :, None].expand_as(fresh)
        if self.valid is not None:
            fresh = torch.where(self.valid[:, None, :, None], fresh, stored.gather(2, index))
        return stored.scatter(2, index, fresh)


class RowKV:
    """Keys and values of one forward pass over rows [batch, width], nothing kept afterwards."""

    def __init__(self, config: MoRConfig, batch: int, width: int, device: torch.device) -> None:
        self.config, self.batch, self.width, self.device = config, batch, width, device
        self.store: dict[int, tuple[Tensor, Tensor]] = {}
        self.first: Packing | None = None

    def prelude(self) -> Attend:
        """All tokens, causally."""
        return CausalAttend()

    def coda(self) -> Attend:
        """All tokens, causally."""
        return CausalAttend()

    def depth(self, depth: int, packing: Packing | None) -> Attend:
        """Active tokens among themselves, or over the rows of depth 0 under sharing."""
        if self.config.kv_sharing == "none":
            return CausalAttend()
        if depth == 0:
            self.first = packing
        slots = rows = None
        if packing is not None and depth > 0:
            slots, rows = self._locate(packing)
        valid = None if packing is None else packing.valid
        return SharedAttend(self.config, self.store, slots, rows, valid)

    def _locate(self, packing: Packing) -> tuple[Tensor, Tensor | None]:
        """Place and row of each token of ``packing`` among those that ran depth 0."""
        if self.first is None:
            return packing.flat % self.width, packing.rows
        where = torch.zeros(self.batch, self.width, dtype=torch.long, device=self.device)
        count = self.first.flat.shape[1]
        places = torch.arange(count, device=self.device).expand_as(self.first.flat)
        where = where.flatten().index_copy(0, self.first.flat.flatten(), places.flatten())
        rows = packing.rows
        if self.first.rows is not None:
            row_of = torch.zeros(self.batch, dtype=torch.long, device=self.device)
            row_of[self.first.rows] = torch.arange(len(self.first.rows), device=self.device)
            rows = row_of if rows is None else row_of[rows]
        return where[packing.flat.flatten()].view_as(packing.flat), rows
