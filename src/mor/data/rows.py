"""Where the tokens of a row are: consecutive text, or the pieces of a best-fit plan."""

from __future__ import annotations

from bisect import bisect_right
from itertools import accumulate, pairwise
from typing import Protocol

import numpy as np

from mor.data.index import DataIndex
from mor.data.packing import load_plan
from mor.data.shards import TokenShard

Piece = tuple[int, int, int]
"""Shard number, first token, number of tokens."""


class Layout(Protocol):
    """How the tokens of a split are laid out in rows of `seq_len`."""

    def __len__(self) -> int:
        """How many rows this layout has."""
        ...

    def pieces(self, row: int) -> list[Piece]:
        """What a row is put together from, from left to right."""
        ...


class Concatenated:
    """The stream of all documents, cut every `seq_len` tokens; the last part-row is left out."""

    def __init__(self, shards: list[TokenShard], seq_len: int, *, by_document: bool) -> None:
        """With `by_document` a piece ends where its document ends, else only where its shard ends.

        So with it each piece is (a part of) one document.
        """
        self._shards, self._seq_len, self._by_document = shards, seq_len, by_document
        self._ends = list(accumulate(shard.num_tokens for shard in shards))

    def __len__(self) -> int:
        """How many rows this layout has."""
        return self._ends[-1] // self._seq_len

    def pieces(self, row: int) -> list[Piece]:
        """What a row is put together from."""
        found: list[Piece] = []
        start, left = row * self._seq_len, self._seq_len
        number = bisect_right(self._ends, start)
        while left:
            shard = self._shards[number]
            inside = start - (self._ends[number] - shard.num_tokens)
            length = min(left, shard.num_tokens - inside)
            if self._by_document:
                # The boundaries strictly inside: each begins another document.
                low, high = np.searchsorted(shard.starts, [inside + 1, inside + length])
                cuts = [inside, *shard.starts[low:high].tolist(), inside + length]
                found += [(number, a, b - a) for a, b in pairwise(cuts)]
            else:
                found.append((number, inside, length))
            start, left, number = start + length, left - length, number + 1
        return found


class BestFit:
    """Rows of `mor.data.packing`, shard after shard; each piece is (a part of) one document."""

    def __init__(
        self, index: DataIndex, split: str, shards: list[TokenShard], seq_len: int
    ) -> None:
        """Load or make the plans. Raises `MorError` where a shard is damaged."""
        infos = index.shards(split)
        self._plans = [load_plan(s, i, seq_len) for s, i in zip(shards, infos, strict=True)]
        self._ends = list(accumulate(plan.num_rows for plan in self._plans))

    def __len__(self) -> int:
        """How many rows this layout has."""
        return self._ends[-1]

    def pieces(self, row: int) -> list[Piece]:
        """What a row is put together from."""
        number = bisect_right(self._ends, row)
        plan = self._plans[number]
        inside = row - (self._ends[number] - plan.num_rows)
        begin, end = plan.rows[inside : inside + 2].tolist()
        starts, lengths = plan.starts[begin:end].tolist(), plan.lengths[begin:end].tolist()
        return [(number, start, length) for start, length in zip(starts, lengths, strict=True)]
