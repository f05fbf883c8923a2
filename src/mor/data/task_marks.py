"""Which tokens of a task are queries, and how hard each one is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Solution:
    """What rows of token ids ask, each `[n, length]`.

    Attributes:
        asked: bool; the tokens that are queries with an answer.
        answers: token id of the answer to each of them; anything elsewhere.
        levels: how hard it is; anything elsewhere.
    """

    asked: np.ndarray
    answers: np.ndarray
    levels: np.ndarray

    def targets(self, ignored: int) -> np.ndarray:
        """The answer after each token but the last, `[n, length - 1]`; `ignored` where none is."""
        found: np.ndarray = np.where(self.asked, self.answers, ignored)[:, :-1]
        return found


@dataclass(frozen=True)
class TaskMarks:
    """What prepared data of a task say about its tokens.

    Attributes:
        settings: name and settings of the task.
        queries: token ids that are followed by an answer.
        levels: token id to the difficulty of the next answer.
    """

    settings: Mapping[str, Any]
    queries: tuple[int, ...]
    levels: Mapping[int, int]

    @classmethod
    def of(cls, stored: Mapping[str, Any]) -> TaskMarks:
        """From the index of a prepared folder."""
        settings = {k: v for k, v in stored.items() if k not in ("queries", "levels")}
        levels = {int(token): int(level) for token, level in stored["levels"].items()}
        return cls(settings, tuple(int(token) for token in stored["queries"]), levels)

    def solve(self, ids: np.ndarray) -> Solution:
        """What rows `[n, length]` ask: the next token is the answer, so the last has none."""
        asked, answers = self.is_query(ids), np.zeros_like(ids)
        asked[:, -1] = False
        answers[:, :-1] = ids[:, 1:]
        return Solution(asked, answers, self.level(ids))

    def is_query(self, ids: np.ndarray) -> np.ndarray:
        """Bool, shaped as `ids`: the tokens whose next token is an answer."""
        return np.isin(ids, self.queries)

    def level(self, ids: np.ndarray) -> np.ndarray:
        """Difficulty at each place of `ids` `[n, length]`: that of the last mark; 0 before one."""
        marks = np.zeros_like(ids)
        for token, level in self.levels.items():
            marks[ids == token] = level
        last = np.maximum.accumulate(np.where(marks > 0, np.arange(ids.shape[-1]), 0), axis=-1)
        return np.take_along_axis(marks, last, axis=-1)
