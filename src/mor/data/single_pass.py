"""What to read as a stream, and how much of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mor.data.hub import HubSource
from mor.data.sources import HUB_PREFIX, FileSource, Source, is_corpus
from mor.data.tasks import TASK_PREFIX, TaskSource, open_task
from mor.errors import MorError


@dataclass(frozen=True)
class Limits:
    """Stop once one of these is reached; the document that reaches it is kept whole.

    Attributes:
        max_documents: documents with text, all splits together.
        max_tokens: tokens, all splits together.
    """

    max_documents: int | None = None
    max_tokens: int | None = None

    def __post_init__(self) -> None:
        """Raise `MorError` where a limit is below 1."""
        for name in ("max_documents", "max_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise MorError(f"{name} is {value}, expected 1 or more, or none")

    def reached(self, documents: int, tokens: int) -> bool:
        """Whether reading stops after so many documents and tokens."""
        return (self.max_documents is not None and documents >= self.max_documents) or (
            self.max_tokens is not None and tokens >= self.max_tokens
        )


@dataclass(frozen=True)
class StreamOptions:
    """How to read a stream.

    Attributes:
        limits: how much of it to prepare.
        hf_config, hf_split, hf_revision: which part, split and commit of an `hf:` source.
        hf_validation_split: the split of it to validate on, read whole; None: a part of `hf_split`.
    """

    limits: Limits = Limits()
    hf_config: str | None = None
    hf_split: str = "train"
    hf_validation_split: str | None = None
    hf_revision: str | None = None

    def pinned(self, source: str | Path, begun: Mapping[str, Any]) -> StreamOptions:
        """With the commit that a preparation of the same dataset was begun with, if there is one.

        So the same command goes on with the same rows, though the dataset has changed since.
        """
        there = begun.get("source")
        if self.hf_revision is None and isinstance(there, Mapping):
            same = there.get("dataset") == str(source).removeprefix(HUB_PREFIX)
            if same and there.get("revision"):
                return replace(self, hf_revision=str(there["revision"]))
        return self


def reads_once(source: str | Path, stream: StreamOptions | bool) -> bool:
    """Whether `source` is to be read as a stream.

    Raises:
        MorError: that makes no sense for it.
    """
    if str(source).startswith((HUB_PREFIX, TASK_PREFIX)):
        return True
    if isinstance(stream, StreamOptions) and replace(stream, limits=Limits()) != StreamOptions():
        raise MorError(f"source {source} is none of Hugging Face's; write {HUB_PREFIX}{source}")
    if stream and is_corpus(source):
        raise MorError(
            f"source {source} cannot be read as a stream; it is small, so leave that out"
        )
    return bool(stream)


def open_readings(
    source: str | Path, options: StreamOptions, text_field: str
) -> tuple[Source, Source | None]:
    """The stream itself, and the one to validate on if it is another.

    Raises:
        MorError: as the sources.
    """
    if str(source).startswith(TASK_PREFIX):
        return TaskSource(open_task(str(source))), None
    if not str(source).startswith(HUB_PREFIX):
        return FileSource(source, text_field), None
    name = str(source).removeprefix(HUB_PREFIX)
    splits = [options.hf_split, options.hf_validation_split]
    first, second = (
        HubSource(
            name,
            config=options.hf_config,
            split=split,
            revision=options.hf_revision,
            text_field=text_field,
        )
        if split
        else None
        for split in splits
    )
    assert first is not None
    if second is not None and options.hf_split == options.hf_validation_split:
        raise MorError(f"{first}: the split to train on and to validate on are the same")
    return first, second
