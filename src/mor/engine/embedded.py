"""Prompts that carry embeddings for some of their places: patches of an image, frames of a sound.

At these places the network reads the given rows in the place of its token embedding; all else
(positions, routing, caching) is as for any token. Cached texts are found by the tokens and, at
embedded places, by a digest of the bytes that were given.
"""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any, overload

import torch
from torch import Tensor

from mor.errors import MorError


@dataclass(frozen=True, eq=False)
class EmbeddedPrompt(Sequence[int]):
    """Token ids, and embeddings in the place of some of them.

    As a sequence it is its token ids.

    Attributes:
        token_ids: one per place; what stands at an embedded place (a placeholder such as
            ``<image>``) counts for penalties and is otherwise not read.
        embeddings: [n, D] floating point, D the model's ``hidden_size``.
        positions: which place each row takes, ascending; None: all places, in order.

    Raises:
        MorError: not as many rows as places, a place that is none or not in order, or numbers that
            are no floating point or not finite.
    """

    token_ids: Sequence[int]
    embeddings: Tensor
    positions: Sequence[int] | None = None

    def __post_init__(self) -> None:
        """Look at everything but the width, which is the model's."""
        rows, places = self.embeddings, self.places
        if not isinstance(rows, Tensor) or not rows.is_floating_point() or rows.dim() != 2:
            shown = list(rows.shape) if isinstance(rows, Tensor) else type(rows).__name__
            raise MorError(f"embeddings is {shown}; it must be [n, hidden_size] in floating point")
        if len(rows) != len(places):
            raise MorError(f"embeddings has {len(rows)} rows for {len(places)} positions")
        if any(isinstance(place, bool) or not isinstance(place, int) for place in places):
            raise MorError("positions must be whole numbers")
        if any(a >= b for a, b in pairwise(places)) or (
            places and not 0 <= places[0] <= places[-1] < len(self.token_ids)
        ):
            raise MorError(
                f"positions must rise and lie in 0..{len(self.token_ids) - 1}, the places of the "
                "prompt"
            )

    @overload
    def __getitem__(self, index: int) -> int: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[int]: ...
    def __getitem__(self, index: int | slice) -> int | Sequence[int]:
        """Token ids."""
        return self.token_ids[index]

    def __len__(self) -> int:
        """How many places the prompt has."""
        return len(self.token_ids)

    @cached_property
    def places(self) -> tuple[int, ...]:
        """The embedded places, ascending."""
        return tuple(range(len(self.token_ids)) if self.positions is None else self.positions)

    def fit(self, width: int, dtype: torch.dtype, device: torch.device) -> Embeddings:
        """The rows as the network reads them: a copy of its type, on its device.

        Raises:
            MorError: another width than the model's, or numbers that are not finite there.
        """
        rows = self.embeddings.detach()
        if rows.shape[1] != width:
            raise MorError(f"embeddings is {list(rows.shape)}; hidden_size={width} is the width")
        rows = rows.to(device, dtype, copy=True).contiguous()
        if not bool(rows.isfinite().all()):
            raise MorError(f"embeddings holds numbers that are not finite in {dtype}")
        return Embeddings(self.places, rows)


@dataclass(frozen=True, eq=False)
class Embeddings:
    """What a request reads at its embedded places.

    Attributes:
        places: ascending.
        rows: [n, D] of the network's type, on its device.
    """

    places: tuple[int, ...]
    rows: Tensor

    @cached_property
    def digests(self) -> list[bytes]:
        """One of each row's bytes, too long for two rows to have the same."""
        raw = self.rows.view(torch.uint8).cpu().numpy()
        return [hashlib.blake2b(row.tobytes(), digest_size=32).digest() for row in raw]

    def spell(self, tokens: Sequence[int]) -> list[Hashable]:
        """``tokens``, with the digest of what is read in the place of each that is not."""
        spelled: list[Hashable] = list(tokens)
        for place, digest in zip(self.places, self.digests, strict=True):
            if place >= len(spelled):
                break
            spelled[place] = digest
        return spelled

    def without(self, told: Sequence[Any], start: int) -> list[Any]:
        """``told``, one entry per place from ``start`` on, with None at the embedded ones."""
        held = set(self.places)
        return [None if start + i in held else entry for i, entry in enumerate(told)]

    def put(self, hidden: Tensor, start: int, end: int) -> None:
        """Write the rows of places ``start .. end`` into ``hidden`` [end - start, D]."""
        chosen = [i for i, place in enumerate(self.places) if start <= place < end]
        if chosen:
            first, last = chosen[0], chosen[-1] + 1
            at = torch.tensor([self.places[i] - start for i in chosen], device=hidden.device)
            hidden.index_copy_(0, at, self.rows[first:last])
