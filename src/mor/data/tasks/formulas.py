"""A column of a spreadsheet, cell by cell: how long the longest chain of formulas under each is."""

from __future__ import annotations

from bisect import bisect
from dataclasses import dataclass
from itertools import accumulate
from typing import ClassVar

import numpy as np

from mor.data.task_marks import Solution
from mor.data.tasks.base import Task


@dataclass(frozen=True)
class Formulas(Task):
    """`3 1 @1+@2 @1*@3 @2`: a word per cell; `@2` is the value of the cell two places back.

    A cell is a number, the copy of a cell, or the sum or product of two, modulo `modulus`. Values
    are not written down: the label of a formula is its value, and the word after it is the next
    cell. A number has level 0, a formula one more than the higher of its cells. So a formula of
    level k takes k steps one after the other, and all formulas of a level can be worked out at
    once. Steps through a map (`task:hops`) can be shortened, since a map of a map is a map; sums
    and products of two unknown values cannot in that way (docs/depth.md says what models learn).

    Attributes:
        cells: of a document.
        numbers: the first cells, which are numbers. All others are formulas, but where every cell
            in reach has the highest level already: there is a number.
        modulus: values are 0 to this less 1.
        reach: how many places back a formula can look.
        levels_up_to: the highest level; level k is drawn with a weight of k**-skew among those
            that the cells in reach allow.
        skew: 0 draws every level alike.
        copies: share of copies among the formulas.
    """

    name: ClassVar[str] = "formulas"
    hidden: ClassVar[bool] = True
    cells: int = 24
    numbers: int = 4
    modulus: int = 5
    reach: int = 8
    levels_up_to: int = 8
    skew: float = 0.5
    copies: float = 0.2

    def check(self) -> None:
        """Raise `MorError` naming the first setting out of its range."""
        super().check()
        self.demand("cells", 2, 4096)
        self.demand("numbers", 1, self.cells - 1)
        self.demand("modulus", 2, 100)
        self.demand("reach", 1, 32)
        self.demand("levels_up_to", 1, 64)
        self.demand("skew", 0, 8)
        self.demand("copies", 0, 1)

    def words(self) -> list[str]:
        """Numbers, copies, sums and products."""
        return [*(str(n) for n in range(self.modulus)), *self.queries()]

    def levels(self) -> dict[str, int]:
        """None: how hard a formula is stands in the cells that it names."""
        return {}

    def queries(self) -> list[str]:
        """Every formula."""
        back = range(1, self.reach + 1)
        pairs = (f"@{x}{sign}@{y}" for sign in "+*" for x in back for y in back)
        return [*(f"@{x}" for x in back), *pairs]

    def document(self, rng: np.random.Generator) -> list[str]:
        """Numbers, then formulas over cells in reach."""
        weights = [level ** -float(self.skew) for level in range(1, self.levels_up_to + 1)]
        numbers = rng.integers(self.modulus, size=self.cells).tolist()
        words: list[str] = []
        levels: list[int] = []
        for chance, first, second, kind, order in rng.random((self.cells, 5)).tolist():
            cell, seen = len(words), levels[-self.reach :]
            # Level k needs a cell of level k - 1.
            fits = [weight if level in seen else 0.0 for level, weight in enumerate(weights)]
            if cell < self.numbers or not any(fits):
                words.append(str(numbers[cell]))
                levels.append(0)
                continue
            level = 1 + _draw(fits, chance)
            x = len(seen) - _pick([i for i, other in enumerate(seen) if other == level - 1], first)
            y = len(seen) - _pick([i for i, other in enumerate(seen) if other < level], second)
            levels.append(level)
            if order < 0.5 and kind >= self.copies:
                x, y = y, x
            sign = "+" if order % 0.5 < 0.25 else "*"
            words.append(f"@{x}" if kind < self.copies else f"@{x}{sign}@{y}")
        return words

    def solve(self, ids: np.ndarray, first: int) -> Solution:
        """See `Task.solve`. A formula that names a cell outside its document has no answer."""
        values, reach = np.full(ids.shape, -1), self.reach
        levels = np.zeros_like(values)
        words = ids - first
        pairs = words - self.modulus - reach
        numbers, formulas = (words >= 0) & (words < self.modulus), words >= self.modulus
        sign, x, y = pairs // reach**2, pairs // reach % reach + 1, pairs % reach + 1
        copied = formulas & (pairs < 0)
        x = np.where(copied, words - self.modulus + 1, x)
        y = np.where(copied, x, y)
        rows, begun = np.arange(len(ids)), np.zeros(len(ids), dtype=np.int64)
        for place in range(ids.shape[1]):
            word = words[:, place]
            begun = np.where(word < 0, place + 1, begun)
            values[:, place] = np.where(numbers[:, place], word, -1)
            cells = [place - back[:, place] for back in (x, y)]
            here = formulas[:, place]
            for cell in cells:
                here = here & (cell >= begun) & (values[rows, cell.clip(min=0)] >= 0)
            a, b = (values[rows, np.where(here, cell, 0)] for cell in cells)
            result = np.where(sign[:, place] == 0, a + b, a * b) % self.modulus
            values[here, place] = np.where(copied[:, place], a, result)[here]
            higher = np.maximum(*(levels[rows, np.where(here, cell, 0)] for cell in cells))
            levels[here, place] = higher[here] + 1
        asked = formulas & (values >= 0)
        return Solution(asked, np.where(asked, first + values, 0), levels)


def _draw(weights: list[float], chance: float) -> int:
    """The place that `chance`, 0 to below 1, falls on where each has its weight."""
    reached = list(accumulate(weights))
    return bisect(reached, chance * reached[-1], hi=len(reached) - 1)


def _pick(places: list[int], chance: float) -> int:
    """One of `places`, each as likely, by `chance`, 0 to below 1."""
    return places[int(chance * len(places))]
