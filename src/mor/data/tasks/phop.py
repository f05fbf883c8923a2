"""p-hop induction (Saunshi et al., arXiv 2502.17416): jump back to the last occurrence, p times."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from mor.data.tasks.base import Task


@dataclass(frozen=True)
class PHop(Task):
    """`length` random symbols, then one query `?k` and its answer.

    From the last symbol jump to the one that followed the previous occurrence of the same symbol;
    do so k times; the answer is the symbol reached. Documents in which a jump finds no earlier
    occurrence are drawn again.

    Attributes:
        symbols: in the alphabet.
        length: of the context, in tokens.
        hops: largest k; k is drawn evenly from 1 to this.
    """

    name: ClassVar[str] = "phop"
    symbols: int = 4
    length: int = 64
    hops: int = 8

    def check(self) -> None:
        """Raise `MorError` naming the first setting out of its range."""
        super().check()
        self.demand("symbols", 2, 64)
        self.demand("hops", 1, 64)
        # Each jump goes back by `symbols` places on average; most drawings must have room.
        self.demand("length", 2 * self.symbols * self.hops)

    def words(self) -> list[str]:
        """Symbols and queries."""
        return [*(f"s{a}" for a in range(self.symbols)), *self.levels()]

    def levels(self) -> dict[str, int]:
        """Jumps of a query."""
        return {f"?{k}": k for k in range(1, self.hops + 1)}

    def queries(self) -> list[str]:
        """Every query."""
        return list(self.levels())

    def document(self, rng: np.random.Generator) -> list[str]:
        """The context, the query, the answer."""
        k = int(rng.integers(1, self.hops + 1))
        while True:
            context = rng.integers(self.symbols, size=self.length)
            place = find_hop(context, k)
            if place is not None:
                return [*(f"s{a}" for a in context), f"?{k}", f"s{context[place]}"]


def find_hop(context: np.ndarray, k: int) -> int | None:
    """Where `k` jumps from the last place of `context` lead; None where one has no target."""
    place = len(context) - 1
    for _ in range(k):
        earlier = np.flatnonzero(context[:place] == context[place])
        if not len(earlier):
            return None
        place = int(earlier[-1]) + 1
    return place
