"""Decoding through a :class:`~mor.model.cache.DepthCache`: write new entries, attend to all.

:class:`CacheKV` answers the same calls as :class:`mor.model.kv.RowKV`, with a cache behind it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mor.config import MoRConfig
from mor.model.cache import DepthCache, KVGroup, grown
from mor.model.layers import Attend
from mor.ops.attention import causal_attention, slot_attention
from mor.ops.compaction import Packing


class CachedAttend:
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
        shared = self.block and self.config.kv_sharing != "none"
        return not shared or self.config.repetition(layer) == 0

    def needs_kv(self, layer: int) -> bool:
        """Where entries are written or refreshed."""
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
        merged = []
        for base, fresh in zip(
            self.group.read(name, self.rows), group.read(name, self.rows), strict=True
        ):
            places = torch.arange(group.used, device=base.device)
            real = places < group.lengths[self.rows][:, None]
            # Places that are not real go to a spare last column that is cut off again.
            target = torch.where(real, group.slots[self.rows, : group.used], base.shape[2])
            index = target[:, None, :, None].expand_as(fresh)
            spare = grown(base, 2, base.shape[2] + 1)
            merged.append(spare.scatter(2, index, fresh)[:, :, :-1])
        return merged[0], merged[1]


class CacheKV:
    """:class:`mor.model.kv.KV` with a :class:`DepthCache` behind it, for one forward pass.

    Args:
        cache: prepared for B rows.
        lengths: [B] real new tokens of each row; the batch is front-packed [B, width].
        width: columns of the batch.
    """

    def __init__(self, cache: DepthCache, lengths: Tensor, width: int) -> None:
        assert cache.seen is not None
        self.cache, self.config = cache, cache.config
        self.lengths, self.width = lengths, width
        self.fresh = not bool(cache.seen.any())
        self.every = torch.arange(len(lengths), device=lengths.device)
        self.numbers = cache.seen[:, None] + torch.arange(width, device=lengths.device)
        self.first_slots: Tensor | None = None

    def _whole(self, group: KVGroup) -> CachedAttend:
        slots = group.reserve(self.every, self.lengths, self.width)
        group.tokens[self.every[:, None], slots] = self.numbers
        return CachedAttend(
            group,
            self.config,
            self.every,
            slots,
            block=False,
            fresh=self.fresh,
            all_rows=True,
        )

    def prelude(self) -> Attend:
        """The prelude's group, all tokens."""
        assert self.cache.prelude is not None
        return self._whole(self.cache.prelude)

    def coda(self) -> Attend:
        """The coda's group, all tokens."""
        assert self.cache.coda is not None
        return self._whole(self.cache.coda)

    def finish(self) -> None:
        """Count the new tokens as seen."""
        assert self.cache.seen is not None
        self.cache.seen = self.cache.seen + self.lengths

    def _appended(self, group: KVGroup, packing: Packing | None) -> tuple[Tensor, Tensor]:
        """Rows and new slots of the tokens of ``packing`` in ``group``."""
        if packing is None:
            rows, counts, width, numbers = self.every, self.lengths, self.width, self.numbers
        else:
            rows = self.every if packing.rows is None else packing.rows
            width = packing.flat.shape[1]
            full = torch.full_like(rows, width)
            counts = full if packing.lengths is None else packing.lengths
            numbers = packing.gather(self.numbers)
        slots = group.reserve(rows, counts, width)
        group.tokens[rows[:, None], slots] = numbers
        return rows, slots

    def depth(self, depth: int, packing: Packing | None) -> Attend:
        """Depth's own group, or depth 0's under sharing."""
        sharing = self.config.kv_sharing
        own = self.cache.depths[0 if sharing == "recursive" else depth]
        all_rows = packing is None or packing.rows is None
        if sharing == "none" or depth == 0:
            rows, slots = self._appended(own, packing)
            if sharing != "none":
                self._remember(packing, slots)
            return CachedAttend(
                own,
                self.config,
                rows,
                slots,
                block=True,
                fresh=self.fresh,
                all_rows=all_rows,
            )
        assert self.first_slots is not None
        first = self.first_slots if packing is None else packing.gather(self.first_slots)
        refreshed = None
        if sharing == "recursive_update":
            rows, slots = self._appended(own, packing)
            own.slots[rows[:, None], slots] = first
            refreshed = (own, slots)
        rows = self.every if packing is None or packing.rows is None else packing.rows
        return CachedAttend(
            self.cache.depths[0],
            self.config,
            rows,
            first,
            block=True,
            fresh=self.fresh,
            all_rows=all_rows,
            refreshed=refreshed,
        )

    def _remember(self, packing: Packing | None, slots: Tensor) -> None:
        """Keep each token's place in the group of depth 0 for the deeper recursions."""
        if packing is None:
            self.first_slots = slots
        else:
            self.first_slots = packing.scatter(torch.zeros_like(self.numbers), slots)
