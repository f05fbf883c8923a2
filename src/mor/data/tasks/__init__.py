"""Made-up tasks in which the depth that a token needs is known: `mor data prepare task:hops`.

A document is a line of words, one token each: facts or an expression, then queries, each followed
by its answer. A query carries its difficulty, and the answer is the next token, so that exact match
needs no parser. Documents are made from (seed, number), so a preparation that was stopped goes on.

| task | a document | difficulty |
|---|---|---|
| `hops` | a map of symbols, a fact a word; queries (symbol, k): where do k steps lead? | k |
| `phop` | random symbols, then k: jump k times to what followed the last occurrence | k |
| `chains` | sums and differences of two-digit numbers, the answer a word | operations |
| `mano` | a prefix expression of + - * modulo a prime, the answer a word | operations |
"""

from mor.data.tasks.base import Task, TaskSource, parse_task, task_tokenizer
from mor.data.tasks.chains import Chains
from mor.data.tasks.hops import Hops
from mor.data.tasks.mano import Mano
from mor.data.tasks.phop import PHop

__all__ = ["TASKS", "TASK_PREFIX", "Task", "TaskSource", "open_task", "task_tokenizer"]

TASKS: dict[str, type[Task]] = {task.name: task for task in (Hops, PHop, Chains, Mano)}
TASK_PREFIX = "task:"


def open_task(source: str) -> Task:
    """The task that `task:NAME` or `task:NAME:field=value,...` names.

    Raises:
        MorError: an unknown task or field, or a value out of its range.
    """
    return parse_task(source.removeprefix(TASK_PREFIX), TASKS)
