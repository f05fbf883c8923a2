"""Decoding through a :class:`~mor.model.cache.DepthCache`: write new entries, attend to all.

:class:`CacheKV` answers the same calls as :class:`mor.model.attend.rows.RowKV`, with a cache
behind it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mor.config import MoRConfig
from mor.model.attend.protocol import KV, Attend
from mor.model.cache import DepthCache, KVGroup, grown
from mor.ops.attention import causal_attention, slot_attention
from mor.ops.compaction import Packing


class CachedAttend(Attend):
    """Attention over a group's rows, new entries written first.

    Args:
        group: the entries written and read.
        config: for which layers share entries.
        rows: [A] batch row of each query row.
        slots: [A, M] each query's own place in the group.
        block: whether these are the shared block's layers, where KV sharing applies.
        fresh: nothing was cached before, so that plain causal attention is exact.
        all_rows: ``rows`` is every row in order.
        refreshed: the group of this depth's own entries and the queries' places in it, where
            active tokens refresh what depth 0 stored.
    """

    def __init__(
        self,
        group: KVGroup,
        config: MoRConfig,
        rows: Tensor,
        slots: Tensor,
        *,
        block: bool,
        fresh: bool,
        all_rows: bool,
        refreshed: tuple[KVGroup, Tensor] | None = None,
    ) -> None:
        self.group, self.config, self.rows, self.slots = group, config, rows, slots
        self.block, self.fresh, self.all_rows = block, fresh, all_rows
        self.refreshed = refreshed

    def _name(self, layer: int) -> int:
        if self.block and self.config.kv_sharing != "none":
            return self.config.shared_layer(layer)
        return layer

    def _writes(self, layer: int) -> bool:
        shared = self.block and self.config.kv_sharing in ("recursive", "recursive_update")
        return not shared or self.config.repetition(layer) == 0

    def needs_kv(self, layer: int) -> bool:
        """True where this layer's entries are written or refreshed."""
        return self._writes(layer) or self.refreshed is not None

    def __call__(
        self, layer: int, query: Tensor, key: Tensor | None, value: Tensor | None
    ) -> Tensor:
        """Write, then attend to every entry up to each query's own."""
        name = self._name(layer)
        if self._writes(layer):
            assert key is not None
            assert value is not None
            self.group.write(name, self.rows, self.slots, key, value)
            if self.fresh:
                return causal_attention(query, key, value)
        elif self.refreshed is not None:
            assert key is not None
            assert value is not None
            keys, values = self._refresh(name, key, value)
            return slot_attention(query, keys, values, self.slots)
        keys, values = self.group.read(name, None if self.all_rows else self.rows)
        return slot_attention(query, keys, values, self.slots)

    def _refresh(self, name: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Depth 0's entries with all that this depth has refreshed, now and before, in place."""
        assert self.refreshed is not None
        group, own_slots = self.refreshed
        group.write(name, self.rows, own_slots, key, value)
        stored, own = self.group.read(name, self.rows), group.read(name, self.rows)
        spare_place = stored[0].shape[2]
        places = torch.arange(group.used, device=group.lengths.device)
        real = places < group.lengths[self.rows][:, None]
        # Places that are not real go to a spare last column that is cut off again.
        target = torch.where(real, group.slots[self.rows, : group.used], spare_place)
        index = target[:, None, :, None].expand_as(own[0])
        keys, values = (
            grown(base, 2, spare_place + 1).scatter(2, index, fresh)[:, :, :-1]
            for base, fresh in zip(stored, own, strict=True)
        )
        return keys, values


class CacheKV(KV):
    """Keys and values of one forward pass, kept in a :class:`DepthCache`.

    Args:
        cache: prepared for B rows.
        lengths: [B] real new tokens of each row; the batch is front-packed [B, width].
        width: columns of the batch.
        columns: columns of the batch before it was packed, padding included.
    """

    flat = False  # its groups hold front-packed rows

    def __init__(self, cache: DepthCache, lengths: Tensor, width: int, columns: int) -> None:
        assert cache.seen is not None
        self.cache, self.config = cache, cache.config
        self.lengths, self.width, self.columns = lengths, width, columns
        self.fresh = not bool(cache.seen.any())
        self.every = torch.arange(len(lengths), device=lengths.device)
        self.numbers = cache.seen[:, None] + torch.arange(width, device=lengths.device)
        self.first_slots: Tensor | None = None
        self.spare: Tensor | None = None
        if self.config.kv_sharing == "propagate":
            self._make_room()

    def _attend(
        self,
        group: KVGroup,
        slots: Tensor,
        packing: Packing | None = None,
        *,
        block: bool,
        refreshed: tuple[KVGroup, Tensor] | None = None,
    ) -> CachedAttend:
        return CachedAttend(
            group,
            self.config,
            self._rows(packing),
            slots,
            block=block,
            # Under `propagate` tokens of one depth see those that left, too.
            fresh=self.fresh and (self.spare is None or packing is None),
            all_rows=packing is None or packing.rows is None,
            refreshed=refreshed,
        )

    def _rows(self, packing: Packing | None) -> Tensor:
        """Batch rows of the tokens of ``packing``."""
        return self.every if packing is None or packing.rows is None else packing.rows

    def prelude(self) -> Attend:
        """Attention over the prelude's group, for all tokens."""
        assert self.cache.prelude is not None
        return self._attend(
            self.cache.prelude, self._appended(self.cache.prelude, None), block=False
        )

    def coda(self) -> Attend:
        """Attention over the coda's group, for all tokens."""
        assert self.cache.coda is not None
        return self._attend(self.cache.coda, self._appended(self.cache.coda, None), block=False)

    def finish(self) -> None:
        """Count the new tokens as seen."""
        assert self.cache.seen is not None
        self.cache.seen = self.cache.seen + self.lengths
        self.cache.columns += self.columns

    def _appended(self, group: KVGroup, packing: Packing | None) -> Tensor:
        """New slots in ``group`` for the tokens of ``packing`` (None for all)."""
        rows = self._rows(packing)
        counts, width, numbers = self.lengths, self.width, self.numbers
        if packing is not None:
            width, numbers = packing.flat.shape[1], packing.gather(self.numbers)
            full = torch.full_like(rows, width)
            counts = full if packing.lengths is None else packing.lengths
        slots = group.reserve(rows, counts, width)
        group.tokens[rows[:, None], slots] = numbers
        return slots

    def depth(self, depth: int, packing: Packing | None) -> Attend:
        """Attention over this depth's own group, or over depth 0's under sharing."""
        sharing = self.config.kv_sharing
        own = self.cache.depths[0 if sharing == "recursive" else depth]
        if sharing == "propagate":
            return self._attend(own, self._places(packing), packing, block=True)
        if sharing == "none" or depth == 0:
            slots = self._appended(own, packing)
            if sharing != "none":
                self._remember(packing, slots)
            return self._attend(own, slots, packing, block=True)
        assert self.first_slots is not None
        first = self.first_slots if packing is None else packing.gather(self.first_slots)
        refreshed = None
        if sharing == "recursive_update":
            slots = self._appended(own, packing)
            own.slots[self._rows(packing)[:, None], slots] = first
            refreshed = (own, slots)
        return self._attend(self.cache.depths[0], first, packing, block=True, refreshed=refreshed)

    def publish(
        self, entries: list[tuple[Tensor, Tensor]], depth: int, packing: Packing | None
    ) -> None:
        """As :meth:`KV.publish`: at every depth from ``depth`` on, whatever the cap of a call."""
        slots, rows = self._places(packing), self._rows(packing)
        for group in self.cache.depths[depth:]:
            for name, (key, value) in enumerate(entries):
                group.write(name, rows, slots, key, value)

    def _make_room(self) -> None:
        """A slot for each new token at each depth, and one behind them for what is not real."""
        for group in self.cache.depths:
            slots = group.reserve(self.every, self.lengths, self.width + 1)
            self.first_slots, self.spare = slots[:, :-1], slots[:, -1:]
            group.tokens[self.every[:, None], self.first_slots] = self.numbers

    def _places(self, packing: Packing | None) -> Tensor:
        """Slots of the tokens of ``packing`` under ``propagate``: the same at every depth."""
        assert self.first_slots is not None
        assert self.spare is not None
        if packing is None:
            return self.first_slots
        slots = packing.gather(self.first_slots)
        if packing.valid is None:
            return slots
        return torch.where(packing.valid, slots, self.spare[self._rows(packing)])

    def _remember(self, packing: Packing | None, slots: Tensor) -> None:
        """Keep each token's place in the group of depth 0 for the deeper recursions."""
        if packing is None:
            self.first_slots = slots
        else:
            self.first_slots = packing.scatter(torch.zeros_like(self.numbers), slots)
