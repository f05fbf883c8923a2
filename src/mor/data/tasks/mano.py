"""Mano: prefix expressions modulo a prime (Physics of Language Models 4.1; arXiv 2510.25741)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from mor.data.tasks.base import Task

_OPERATIONS = {
    "+": lambda a, b: a + b,
    "-": lambda a, b: a - b,
    "*": lambda a, b: a * b,
}


@dataclass(frozen=True)
class Mano(Task):
    """`len2 + 3 * 4 5 ans 0`: an expression of that many operations, and its value.

    Attributes:
        length: most operations; their number is drawn evenly from 1 to this.
        modulus: values are 0 to this less 1.
    """

    name: ClassVar[str] = "mano"
    length: int = 4
    modulus: int = 23

    def check(self) -> None:
        """Raise `MorError` naming the first setting out of its range."""
        super().check()
        self.demand("length", 1, 64)
        self.demand("modulus", 2, 1000)

    def words(self) -> list[str]:
        """Lengths, operations, values."""
        return [*self.levels(), *_OPERATIONS, "ans", *(str(n) for n in range(self.modulus))]

    def levels(self) -> dict[str, int]:
        """Operations of an expression, said at its beginning."""
        return {f"len{k}": k for k in range(1, self.length + 1)}

    def queries(self) -> list[str]:
        """The word before the value."""
        return ["ans"]

    def document(self, rng: np.random.Generator) -> list[str]:
        """An expression and its value."""
        k = int(rng.integers(1, self.length + 1))
        words, value = self._draw(rng, k)
        return [f"len{k}", *words, "ans", str(value)]

    def _draw(self, rng: np.random.Generator, operations: int) -> tuple[list[str], int]:
        """A random expression of so many operations; each split of them is as likely."""
        if operations == 0:
            value = int(rng.integers(self.modulus))
            return [str(value)], value
        sign = str(rng.choice(list(_OPERATIONS)))
        left = int(rng.integers(operations))
        first, a = self._draw(rng, left)
        second, b = self._draw(rng, operations - 1 - left)
        return [sign, *first, *second], _OPERATIONS[sign](a, b) % self.modulus
