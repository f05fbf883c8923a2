"""What every task is: fields, words, documents; and a source of its documents."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from mor.data.documents import Document
from mor.data.task_marks import Solution
from mor.data.tokenizer import END_OF_TEXT, PAD, wrap_rules
from mor.errors import MorError

if TYPE_CHECKING:  # it takes seconds to import
    from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True)
class Task:
    """Base of all tasks; a subclass is a frozen dataclass whose fields are its settings.

    Attributes:
        documents: how many documents there are.
        seed: which ones.
    """

    name: ClassVar[str] = ""
    hidden: ClassVar[bool] = False  # answers are no words of the document: `solve` finds them
    documents: int = 200_000
    seed: int = 0

    def check(self) -> None:
        """Raise `MorError` naming the first setting out of its range."""
        self.demand("documents", 1)
        self.demand("seed", 0)

    def demand(self, field: str, least: int, most: int | None = None) -> None:
        """Raise `MorError` unless `least <= field <= most`."""
        value = getattr(self, field)
        if value < least or (most is not None and value > most):
            span = f"{least} or more" if most is None else f"{least} to {most}"
            raise MorError(f"task:{self.name}: {field}={value}, expected {span}")

    def words(self) -> list[str]:
        """The vocabulary, each word a token."""
        raise NotImplementedError

    def levels(self) -> dict[str, int]:
        """Words that say how hard the next answer is, and the difficulty they say."""
        raise NotImplementedError

    def queries(self) -> list[str]:
        """Words that are followed by an answer."""
        raise NotImplementedError

    def document(self, rng: np.random.Generator) -> list[str]:
        """The words of one document, made from `rng`."""
        raise NotImplementedError

    def solve(self, ids: np.ndarray, first: int) -> Solution:
        """Answers that documents do not hold, of rows of token ids `[n, length]`.

        Args:
            ids: documents, or pieces of them; ids below `first` stand between documents.
            first: id of the first of `words`; the others follow in order.
        """
        raise NotImplementedError

    def text(self, number: int) -> str:
        """Document `number` (0-based): always the same."""
        rng = np.random.Generator(np.random.Philox(key=(self.seed, number)))
        return " ".join(self.document(rng))

    def settings(self) -> dict[str, Any]:
        """Name and fields: what decides the documents."""
        return {"name": self.name, **asdict(self)}

    def marks(self, vocabulary: Mapping[str, int]) -> dict[str, Any]:
        """The settings, with queries and difficulties as token ids: kept with prepared data."""
        if self.hidden:
            return self.settings() | {"first": vocabulary[self.words()[0]]}
        return self.settings() | {
            "queries": sorted(vocabulary[word] for word in self.queries()),
            "levels": {str(vocabulary[word]): k for word, k in self.levels().items()},
        }


def parse_task(text: str, tasks: Mapping[str, type[Task]]) -> Task:
    """The task of `NAME` or `NAME:field=value,...`.

    Raises:
        MorError: an unknown task or field, or a value of the wrong type or out of range.
    """
    name, _, given = text.partition(":")
    if name not in tasks:
        raise MorError(f"task {name!r} is not known; use one of: {', '.join(tasks)}")
    kinds: dict[str, Any] = {f.name: type(f.default) for f in fields(tasks[name])}
    values: dict[str, Any] = {}
    for part in filter(None, given.split(",")):
        field, equals, value = (piece.strip() for piece in part.partition("="))
        if field not in kinds:
            close = difflib.get_close_matches(field, kinds, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"its fields: {', '.join(kinds)}"
            raise MorError(f"task:{name} has no field {field!r}; {hint}")
        try:
            values[field] = kinds[field](value)
        except ValueError:
            equals = ""
        if not equals:
            kind = kinds[field].__name__
            raise MorError(f"task:{name}: {part!r} is no field=value; {field} is of type {kind}")
    task = tasks[name](**values)
    task.check()
    return task


def task_tokenizer(task: Task) -> PreTrainedTokenizerFast:
    """A tokenizer with a token per word; the end-of-text token and padding come first."""
    vocabulary = {word: number for number, word in enumerate((END_OF_TEXT, PAD, *task.words()))}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token=PAD))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.decoder = decoders.WordPiece(prefix="##", cleanup=False)  # a blank between words
    return wrap_rules(words)


class TaskSource:
    """The documents of a task, as a source that can be left and taken up again."""

    def __init__(self, task: Task) -> None:
        self.task = task

    def read(self, position: Mapping[str, Any] | None = None) -> TaskReading:
        """Begin a pass at the start or at `position`."""
        return TaskReading(self.task, int(position["document"]) if position else 0)

    def identity(self) -> dict[str, Any]:
        """The task's settings."""
        return {"task": self.task.settings()}

    def num_documents(self) -> int | None:
        """As many as the task says."""
        return self.task.documents


class TaskReading:
    """A pass over the documents of a task."""

    def __init__(self, task: Task, number: int) -> None:
        """Begin at document `number`."""
        self._task, self._number = task, number

    def __iter__(self) -> Iterator[Document]:
        """Yield the documents that are left."""
        while self._number < self._task.documents:
            number = self._number
            self._number += 1
            yield Document(f"{self._task.name}/{number}", self._task.text(number))

    def position(self) -> Mapping[str, Any]:
        """The number of the next document."""
        return {"document": self._number}
