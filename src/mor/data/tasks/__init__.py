"""Made-up tasks in which the depth that a token needs is known: `mor data prepare task:hops`.

A document is a line of words, one token each: facts or an expression, then queries, each followed
by its answer. A query carries its difficulty, and the answer is the next token, so that exact match
needs no parser. In `formulas` every formula is a query, and its answer is a label alone. Documents
are made from (seed, number), so a preparation that was stopped goes on.

| task | a document | difficulty |
|---|---|---|
| `hops` | a map of symbols, a fact a word; queries (symbol, k): where do k steps lead? | k |
| `phop` | random symbols, then k: jump k times to what followed the last occurrence | k |
| `chains` | sums and differences of two-digit numbers, the answer a word | operations |
| `mano` | a prefix expression of + - * modulo a prime, the answer a word | operations |
| `formulas` | numbers, then formulas over earlier cells | formulas under it, one upon the other |
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from mor.data.task_marks import Solution, TaskMarks
from mor.data.tasks.base import Task, TaskSource, parse_task, task_tokenizer
from mor.data.tasks.chains import Chains
from mor.data.tasks.formulas import Formulas
from mor.data.tasks.hops import Hops
from mor.data.tasks.mano import Mano
from mor.data.tasks.phop import PHop

__all__ = [
    "TASKS",
    "TASK_PREFIX",
    "SolvedMarks",
    "Task",
    "TaskSource",
    "open_task",
    "read_marks",
    "task_tokenizer",
]

TASKS: dict[str, type[Task]] = {task.name: task for task in (Hops, PHop, Chains, Mano, Formulas)}
TASK_PREFIX = "task:"


def open_task(source: str) -> Task:
    """The task that `task:NAME` or `task:NAME:field=value,...` names.

    Raises:
        MorError: an unknown task or field, or a value out of its range.
    """
    return parse_task(source.removeprefix(TASK_PREFIX), TASKS)


@dataclass(frozen=True)
class SolvedMarks:
    """What prepared data of a task with hidden answers say about their tokens.

    Attributes:
        settings: name and settings of the task.
        task: that they name.
        first: token id of its first word.
    """

    settings: Mapping[str, Any]
    task: Task
    first: int

    def solve(self, ids: np.ndarray) -> Solution:
        """What rows `[n, length]` ask."""
        return self.task.solve(ids, self.first)


def read_marks(stored: Mapping[str, Any]) -> TaskMarks | SolvedMarks:
    """From the index of a prepared folder.

    Raises:
        MorError: a task or a setting that this version does not know.
    """
    if "first" not in stored:
        return TaskMarks.of(stored)
    settings = {field: value for field, value in stored.items() if field != "first"}
    given = ",".join(f"{field}={value}" for field, value in settings.items() if field != "name")
    return SolvedMarks(settings, open_task(f"{settings['name']}:{given}"), stored["first"])
