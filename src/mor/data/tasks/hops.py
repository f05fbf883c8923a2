"""Hops through a map that the context gives: how far a lookup has to be chained is known."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from mor.data.tasks.base import Task
from mor.errors import MorError


@dataclass(frozen=True)
class Hops(Task):
    """Facts `s3>s5` (a word each, in random order), then queries `s3^2` and answers `s1`.

    Every symbol has one successor. `graph` says which maps are drawn: any `permutation`, in which
    k steps can lead round a short cycle, so that a large k may be easy; or one `cycle` through all
    symbols, in which k is how many steps there are for every k up to half the symbols.

    Attributes:
        symbols: in the map.
        hops: most steps a query asks for; k is drawn from 1 to this.
        skew: 0 draws every k alike; s > 0 draws k with a weight of k**-s, so that short ways, which
            long ones are made of, are met more often. For training; judge on data without.
        queries_each: queries per document.
        graph: `permutation` or `cycle`.
    """

    name: ClassVar[str] = "hops"
    symbols: int = 8
    hops: int = 8
    queries_each: int = 8
    graph: str = "permutation"
    skew: float = 0.0

    def check(self) -> None:
        """Raise `MorError` naming the first setting out of its range."""
        super().check()
        self.demand("symbols", 2, 64)
        self.demand("hops", 1, 64)
        self.demand("queries_each", 1)
        self.demand("skew", 0, 8)
        if self.graph not in ("permutation", "cycle"):
            raise MorError(f"task:hops: graph={self.graph!r}, expected 'permutation' or 'cycle'")

    def words(self) -> list[str]:
        """Facts, queries, answers."""
        names = range(self.symbols)
        return [
            *(f"s{a}>s{b}" for a in names for b in names),
            *(f"s{a}^{k}" for a in names for k in range(1, self.hops + 1)),
            *(f"s{a}" for a in names),
        ]

    def levels(self) -> dict[str, int]:
        """A query's number of steps."""
        ks = range(1, self.hops + 1)
        return {f"s{a}^{k}": k for a in range(self.symbols) for k in ks}

    def queries(self) -> list[str]:
        """Every query."""
        return list(self.levels())

    def document(self, rng: np.random.Generator) -> list[str]:
        """All facts in random order, then the queries with their answers."""
        order = rng.permutation(self.symbols)
        after = np.empty(self.symbols, dtype=np.int64)
        if self.graph == "cycle":
            after[order] = np.roll(order, -1)
        else:
            after[:] = order
        words = [f"s{a}>s{after[a]}" for a in rng.permutation(self.symbols)]
        starts = rng.integers(self.symbols, size=self.queries_each)
        if self.skew:
            weights = np.arange(1, self.hops + 1, dtype=np.float64) ** -self.skew
            drawn = rng.random(self.queries_each) * weights.sum()
            steps = 1 + np.searchsorted(weights.cumsum(), drawn).clip(max=self.hops - 1)
        else:
            steps = rng.integers(1, self.hops + 1, size=self.queries_each)
        for start, k in zip(starts, steps, strict=True):
            place = start
            for _ in range(k):
                place = after[place]
            words += [f"s{start}^{k}", f"s{place}"]
        return words
