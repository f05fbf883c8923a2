"""Chains of sums of two-digit numbers, whose length is the work that the answer takes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from mor.data.tasks.base import Task


@dataclass(frozen=True)
class Chains(Task):
    """`len3 18 + 3 - 52 + 7 = 76`: everything modulo `modulus`, answers included.

    Attributes:
        operations: most operations of a chain; their number is drawn evenly from 1 to this.
        modulus: numbers are 0 to this less 1.
        queries_each: chains per document.
    """

    name: ClassVar[str] = "chains"
    operations: int = 6
    modulus: int = 100
    queries_each: int = 4

    def check(self) -> None:
        """Raise `MorError` naming the first setting out of its range."""
        super().check()
        self.demand("operations", 1, 64)
        self.demand("modulus", 2, 1000)
        self.demand("queries_each", 1)

    def words(self) -> list[str]:
        """Lengths, signs and numbers."""
        return [*self.levels(), "+", "-", "=", *(str(n) for n in range(self.modulus))]

    def levels(self) -> dict[str, int]:
        """Operations of a chain, said at its beginning."""
        return {f"len{k}": k for k in range(1, self.operations + 1)}

    def queries(self) -> list[str]:
        """The sign of equality."""
        return ["="]

    def document(self, rng: np.random.Generator) -> list[str]:
        """Chains with their results."""
        words = []
        for _ in range(self.queries_each):
            k = int(rng.integers(1, self.operations + 1))
            numbers = rng.integers(self.modulus, size=k + 1)
            signs = rng.choice([1, -1], size=k)
            words += [f"len{k}", str(numbers[0])]
            for sign, number in zip(signs, numbers[1:], strict=True):
                words += ["+" if sign > 0 else "-", str(number)]
            result = int(numbers[0] + (signs * numbers[1:]).sum()) % self.modulus
            words += ["=", str(result)]
        return words
