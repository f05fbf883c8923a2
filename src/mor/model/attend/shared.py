"""How tokens of a pass see those of other depths: as depth 0 stored them, or as they ended."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mor.config import MoRConfig
from mor.model.attend.among import CausalAttend, lay_end_to_end, lay_in_rows
from mor.model.attend.protocol import Attend
from mor.ops.attention import (
    SharedRuns,
    SharedSegments,
    prefix_attention,
    shared_run_attention,
    shared_segment_attention,
)
from mor.ops.full_attention import Meeting, masked_attention, meeting_attention
from mor.ops.prefix import Walk


@dataclass(frozen=True)
class Shared:
    """How a later depth's tokens meet the keys that depth 0 stored.

    Attributes:
        places: [A M] where each token stands among the stored ones laid end to end.
        how: over segments, over runs of unknown lengths, or over rows of equal length; the last
            two see all keys of a segment or, None, of a row.
    """

    places: Tensor
    how: SharedSegments | SharedRuns | Walk | Meeting | None

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """[A, H, M, d] over stored [A0, Hkv, M0, d]; causal, each query up to its own place."""
        if self.how is None:
            return masked_attention(query, key, value)
        if isinstance(self.how, Walk):
            return prefix_attention(query, key, value, self.how)
        one, two, three = lay_end_to_end(query), lay_end_to_end(key), lay_end_to_end(value)
        if isinstance(self.how, Meeting):
            return lay_in_rows(meeting_attention(one, two, three, self.how), query)
        if isinstance(self.how, SharedRuns):
            return lay_in_rows(shared_run_attention(one, two, three, self.how), query)
        return lay_in_rows(shared_segment_attention(one, two, three, self.how), query)

    def refresh(self, stored: Tensor, fresh: Tensor) -> Tensor:
        """Stored heads with those of this depth's tokens replaced, for this depth only."""
        room = lay_end_to_end(stored)
        if isinstance(self.how, SharedRuns):  # a place for what is not real
            room = torch.cat((room, room.new_zeros(1, *room.shape[1:])))
        written = room.index_copy(0, self.places, lay_end_to_end(fresh))
        return lay_in_rows(written[: len(written) - isinstance(self.how, SharedRuns)], stored)


class SharedAttend(Attend):
    """Recursive KV sharing: the first use of a shared layer stores, later uses read (paper 2.3).

    Args:
        config: for which unrolled layer uses which shared layer.
        store: keys and values of first uses, by shared layer.
        own: attention of these tokens among themselves.
        shared: how they meet the stored ones; None where they are the same tokens.
    """

    def __init__(
        self,
        config: MoRConfig,
        store: dict[int, tuple[Tensor, Tensor]],
        own: CausalAttend,
        shared: Shared | None,
    ) -> None:
        self.config, self.store, self.own, self.shared = config, store, own, shared
        self.update = config.kv_sharing == "recursive_update"

    def _first(self, layer: int) -> bool:
        return self.config.repetition(layer) == 0

    def needs_kv(self, layer: int) -> bool:
        """True for a layer's first use, and for all where active tokens refresh their entries."""
        return self._first(layer) or self.update

    def __call__(
        self, layer: int, query: Tensor, key: Tensor | None, value: Tensor | None
    ) -> Tensor:
        """Attention of the queries over the stored tokens."""
        name = self.config.shared_layer(layer)
        if self._first(layer):
            assert key is not None
            assert value is not None
            # Kept from the first pass: checkpointing runs this again in the backward pass.
            self.store.setdefault(name, (key, value))
            return self.own(layer, query, key, value)
        keys, values = self.store[name]
        if self.shared is None:
            return self.own(layer, query, *((key, value) if self.update else (keys, values)))
        if self.update:
            assert key is not None
            assert value is not None
            keys, values = self.shared.refresh(keys, key), self.shared.refresh(values, value)
        return self.shared.attend(query, keys, values)


class PropagatedAttend(Attend):
    """Every token is seen: those of this pass as they are, the others as they ended.

    Args:
        config: for which unrolled layer uses which shared layer.
        stored: keys and values of those that left, laid in all tokens [A0, Hkv, M0, d], by shared
            layer; nothing where nobody has left.
        shape: A0 and M0.
        shared: how the tokens of this pass meet all tokens.
    """

    def __init__(
        self,
        config: MoRConfig,
        stored: dict[int, tuple[Tensor, Tensor]],
        shape: tuple[int, int],
        shared: Shared,
    ) -> None:
        # As of now: checkpointing runs this again when others have left since.
        self.config, self.stored = config, dict(stored)
        self.shape, self.shared = shape, shared

    def needs_kv(self, layer: int) -> bool:
        """True: every pass has its own keys and values."""
        return True

    def __call__(
        self, layer: int, query: Tensor, key: Tensor | None, value: Tensor | None
    ) -> Tensor:
        """Attention of the queries over all tokens up to each."""
        assert key is not None
        assert value is not None
        stored = self.stored.get(self.config.shared_layer(layer))
        keys, values = stored or make_room(self.shape, key, value)
        keys, values = self.shared.refresh(keys, key), self.shared.refresh(values, value)
        return self.shared.attend(query, keys, values)


def make_room(shape: tuple[int, int], key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Zeros for key and value of tokens ``shape`` [A0, M0], like those [A, Hkv, M, d] of some."""
    rows, width = shape
    first, second = (one.new_zeros(rows, one.shape[1], width, one.shape[3]) for one in (key, value))
    return first, second
