"""The decoding cache: keys and values per depth, for the tokens that were active there.

One :class:`KVGroup` holds the layers that share their entries: the prelude, the block at one depth,
the coda. Under recursion-wise caching depth r's group holds the tokens that ran depth r and nothing
else, so cached bytes follow the routing: (R + 1) / 2R of the block's share at the default
capacities (paper 2.3). Under recursive sharing there is depth 0's group alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from mor.config import MoRConfig

_GROWTH = 64


class KVGroup:
    """Entries of layers that hold the same tokens: front-packed rows that grow at the end.

    What is written in place is made as ordinary tensors, so that decoding may begin within
    ``torch.inference_mode`` and go on without.

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
            self.tokens, self.slots = grown(self.tokens, 1, room), grown(self.slots, 1, room)
            for store in (self.keys, self.values):
                for layer in store:
                    store[layer] = grown(store[layer], 2, room)
        self.lengths = self.lengths.index_copy(0, rows, before + counts)
        self.used = max(self.used, needed)
        return slots

    def write(self, layer: int, rows: Tensor, slots: Tensor, key: Tensor, value: Tensor) -> None:
        """Store key, value [A, Hkv, M, d] of one layer at ``slots`` [A, M] of ``rows`` [A]."""
        for store, fresh in ((self.keys, key), (self.values, value)):
            if layer not in store:
                shape = (len(self.lengths), fresh.shape[1], self.tokens.shape[1], fresh.shape[3])
                # Zeros, not empty memory: what a mask hides must still be a number.
                with _ordinary():
                    store[layer] = fresh.new_zeros(shape)
            elif torch.is_grad_enabled() and (fresh.requires_grad or store[layer].requires_grad):
                store[layer] = store[layer].clone()  # a backward pass may still need what it was
            store[layer][rows[:, None], :, slots] = fresh.transpose(1, 2)

    def read(self, layer: int, rows: Tensor | None) -> tuple[Tensor, Tensor]:
        """Keys and values [A, Hkv, used, d] of ``rows`` (None for all rows, without a copy)."""
        key, value = self.keys[layer][:, :, : self.used], self.values[layer][:, :, : self.used]
        return (key, value) if rows is None else (key[rows], value[rows])

    def select(self, index: Tensor) -> None:
        """Keep, reorder or repeat rows."""
        with _ordinary():
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


@contextmanager
def _ordinary() -> Iterator[None]:
    """Make ordinary tensors, within ``torch.inference_mode`` too."""
    if not torch.is_inference_mode_enabled():
        yield
        return
    with torch.inference_mode(False), torch.no_grad():
        yield


def grown(tensor: Tensor, axis: int, size: int) -> Tensor:
    """``tensor`` with zeros appended along ``axis`` up to ``size``."""
    shape = list(tensor.shape)
    shape[axis] = size - shape[axis]
    with _ordinary():
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
