"""The decoding cache: keys and values per depth, for the tokens that were active there.

One :class:`KVGroup` holds the layers that share their entries: the prelude, the block at one depth,
the coda. Under recursion-wise caching depth r's group holds the tokens that ran depth r and nothing
else, so cached bytes follow the routing: (R + 1) / 2R of the block's share at the default
capacities (paper 2.3). Under recursive sharing there is depth 0's group alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mor.config import MoRConfig
from mor.model.layers import Attend
from mor.ops.attention import causal_attention, slot_attention
from mor.ops.compaction import Packing

_GROWTH = 64


class KVGroup:
    """Entries of layers that hold the same tokens: front-packed rows that grow at the end.

    Attributes:
        keys, values: by layer name, each [B, Hkv, capacity, head_dim].
        lengths: [B] entries per row.
        tokens: [B, capacity] which token of its row an entry belongs to (for cropping).
        slots: [B, capacity] place of that token in the group of depth 0 (for refreshed entries).
    """

    def __init__(self, batch: int, device: torch.device) -> None:
        self.keys: dict[int, Tensor] = {}
        self.values: dict[int, Tensor] = {}
        self.lengths = torch.zeros(batch, dtype=torch.long, device=device)
        self.tokens = torch.zeros(batch, 0, dtype=torch.long, device=device)
        self.slots = torch.zeros(batch, 0, dtype=torch.long, device=device)
        self.used = 0
        """An upper bound of ``lengths`` known without asking the device."""

    def reserve(self, rows: Tensor, counts: Tensor, width: int) -> Tensor:
        """Make room for ``width`` entries in ``rows`` [A], of which ``counts`` [A] will be real.

        Returns:
            Slots [A, width] of the new entries.
        """
        before = self.lengths[rows]
        slots = before[:, None] + torch.arange(width, device=rows.device)
        needed = int(slots.max()) + 1
        if needed > self.tokens.shape[1]:
            room = needed + max(_GROWTH, needed // 4)
            self.tokens, self.slots = _grown(self.tokens, 1, room), _grown(self.slots, 1, room)
            for store in (self.keys, self.values):
                for layer in store:
                    store[layer] = _grown(store[layer], 2, room)
        self.lengths = self.lengths.index_copy(0, rows, before + counts)
        self.used = max(self.used, needed)
        return slots

    def write(self, layer: int, rows: Tensor, slots: Tensor, key: Tensor, value: Tensor) -> None:
        """Store key, value [A, Hkv, M, d] of one layer at ``slots`` [A, M] of ``rows`` [A]."""
        for store, fresh in ((self.keys, key), (self.values, value)):
            if layer not in store:
                shape = (len(self.lengths), fresh.shape[1], self.tokens.shape[1], fresh.shape[3])
                # Zeros, not empty memory: what a mask hides must still be a number.
                store[layer] = fresh.new_zeros(shape)
            store[layer][rows[:, None], :, slots] = fresh.transpose(1, 2)

    def read(self, layer: int, rows: Tensor | None) -> tuple[Tensor, Tensor]:
        """Keys and values [A, Hkv, used, d] of ``rows`` (None for all rows, without a copy)."""
        key, value = self.keys[layer][:, :, : self.used], self.values[layer][:, :, : self.used]
        return (key, value) if rows is None else (key[rows], value[rows])

    def select(self, index: Tensor) -> None:
        """Keep, reorder or repeat rows."""
        for store in (self.keys, self.values):
            for layer in store:
                store[layer] = store[layer].index_select(0, index)
        self.lengths, self.tokens = self.lengths[index], self.tokens[index]
        self.slots = self.slots[index]

    def crop(self, tokens: Tensor) -> None:
        """Forget the entries of tokens numbered ``tokens`` [B] and later in their rows."""
        places = torch.arange(self.tokens.shape[1], device=self.tokens.device)
        kept = (places < self.lengths[:, None]) & (self.tokens < tokens[:, None])
        self.lengths = kept.sum(1)
        self.used = int(self.lengths.max()) if len(self.lengths) else 0

    def entry_bytes(self) -> int:
        """Bytes of one entry over all layers of the group."""
        stored = [*self.keys.values(), *self.values.values()]
        return sum(t.shape[1] * t.shape[3] * t.element_size() for t in stored)

    def nbytes(self) -> int:
        """Bytes of the entries that are there."""
        return int(self.lengths.sum()) * self.entry_bytes()

    def allocated_nbytes(self) -> int:
        """Bytes of the tensors that hold them, spare room included."""
        return sum(t.nbytes for t in (*self.keys.values(), *self.values.values()))


def _grown(tensor: Tensor, axis: int, size: int) -> Tensor:
    shape = list(tensor.shape)
    shape[axis] = size - shape[axis]
    return torch.cat((tensor, tensor.new_zeros(shape)), dim=axis)


class DepthCache:
    """Cache of one batch of sequences: prelude, coda, and one group per depth.

    Attributes:
        seen: [B] real tokens of each row so far; the next token's position.
    """

    def __init__(self, config: MoRConfig) -> None:
        self.config = config
        self.prelude: KVGroup | None = None
        self.coda: KVGroup | None = None
        self.depths: list[KVGroup] = []
        self.seen: Tensor | None = None
        self.columns = 0
        """Tokens per row including padding: what Hugging Face calls the sequence length."""

    def prepare(self, batch: int, device: torch.device) -> Tensor:
        """Set up for ``batch`` rows at the first call; returns ``seen`` [B].

        Raises:
            ValueError: the cache already holds another number of rows.
        """
        if self.seen is None:
            self.seen = torch.zeros(batch, dtype=torch.long, device=device)
            self.prelude, self.coda = KVGroup(batch, device), KVGroup(batch, device)
            count = 1 if self.config.kv_sharing == "recursive" else self.config.num_recursions
            self.depths = [KVGroup(batch, device) for _ in range(count)]
        if len(self.seen) != batch:
            raise ValueError(
                f"the cache holds {len(self.seen)} rows but input_ids has {batch}; "
                "use a new cache, or reorder_cache / batch_select_indices first"
            )
        return self.seen

    def groups(self) -> list[KVGroup]:
        """All groups, in the order of the stages."""
        return [g for g in (self.prelude, *self.depths, self.coda) if g is not None]

    def nbytes(self) -> int:
        """Bytes of all cached entries: only what active tokens left behind."""
        return sum(group.nbytes() for group in self.groups())

    def allocated_nbytes(self) -> int:
        """Bytes of the tensors behind them, padding and spare room included."""
        return sum(group.allocated_nbytes() for group in self.groups())

    def vanilla_nbytes(self) -> int:
        """Bytes a vanilla model of the same unrolled depth and dtype would hold for these rows."""
        group = self.prelude if self.prelude and self.prelude.keys else None
        group = group or next((g for g in self.groups() if g.keys), None)
        if group is None or self.seen is None:
            return 0
        per_layer = group.entry_bytes() // len(group.keys)
        return int(self.seen.sum()) * per_layer * self.config.num_hidden_layers

    def select_rows(self, index: Tensor) -> None:
        """Keep, reorder or repeat rows of every group."""
        if self.seen is not None:
            self.seen = self.seen[index]
            for group in self.groups():
                group.select(index)

    def crop_tokens(self, tokens: Tensor) -> None:
        """Forget tokens numbered ``tokens`` [B] and later in their rows."""
        if self.seen is not None:
            self.seen = torch.minimum(self.seen, tokens)
            for group in self.groups():
                group.crop(self.seen)


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
            spare = _grown(base, 2, base.shape[2] + 1)
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
