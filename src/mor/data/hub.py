"""Datasets of the Hugging Face hub, read as a stream: `hf:HuggingFaceTB/smollm-corpus`.

The library `datasets` does the work; a local folder in the hub's layout is read the same way. A
dataset of the hub is pinned to the commit it has when the preparation begins, so that one that is
taken up again reads the very same rows.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mor.data.documents import BadRow, Document
from mor.data.extras import need_extra
from mor.data.sources import HUB_PREFIX, files_digest
from mor.data.tables import column_values, row_of
from mor.errors import MorError

if TYPE_CHECKING:
    from datasets import IterableDataset


class HubSource:
    """One split of a dataset, streamed row by row."""

    def __init__(
        self,
        name: str,
        *,
        config: str | None = None,
        split: str = "train",
        revision: str | None = None,
        text_field: str = "text",
    ) -> None:
        """Find the dataset; no row is read yet.

        Args:
            name: of the dataset, such as `HuggingFaceTB/smollm-corpus`, or a local folder.
            config: which part of it, where it has several.
            split: which of its splits.
            revision: commit, tag or branch; by default the commit it has now.
            text_field: the column that holds the text.

        Raises:
            MorError: `datasets` is not installed; the dataset, part, split or column is unknown
                or cannot be reached.
        """
        try:
            import datasets
        except ImportError:
            raise need_extra(f"{HUB_PREFIX} sources", "datasets") from None
        self.name, self.config, self.split, self.text_field = name, config, split, text_field
        self.local = Path(name).expanduser()
        if self.local.is_dir() and revision:
            raise MorError(f"{self} is a local folder, which has no revision {revision!r}")
        try:
            if self.local.is_dir():
                self.revision = None
                path = str(self.local)
            else:
                path = name
                self.revision = _commit(name, revision)
            rows = datasets.load_dataset(
                path, config, split=split, revision=self.revision, streaming=True
            )
            names = rows.column_names or list(next(iter(rows), {}))
        except Exception as error:  # the library raises whatever a file or a server causes
            raise MorError(f"{self} cannot be opened: {_line(error)}") from error
        if text_field not in names:
            raise MorError(
                f"{self} has no column {text_field!r}; its columns: {', '.join(map(repr, names))}"
            )
        # As Arrow gives them: the library's own decoding ends at bytes that are not UTF-8.
        self._rows: IterableDataset = rows.select_columns([text_field]).with_format("arrow")
        self._start = self._rows.state_dict()

    def __str__(self) -> str:
        """For messages: everything that was asked for."""
        parts = [f"{HUB_PREFIX}{self.name}", *([self.config] if self.config else []), self.split]
        return " ".join(parts)

    def read(self, position: Mapping[str, Any] | None = None) -> HubReading:
        """Begin a pass at the start or at `position`."""
        begin = position or {"documents": 0, "state": self._start}
        return HubReading(self, self._rows, begin)

    def identity(self) -> dict[str, Any]:
        """Part, split, column, and the commit or (for a folder) a digest of names and sizes."""
        digest = None
        if self.revision is None:
            files = sorted(p for p in self.local.rglob("*") if p.is_file())
            names = [file.relative_to(self.local).as_posix() for file in files]
            digest = files_digest(self.local, names)
        return {
            # A local folder may move: its files say what it is.
            "dataset": None if digest else self.name,
            "files_sha256": digest,
            "revision": self.revision,
            "config": self.config,
            "split": self.split,
            "text_field": self.text_field,
        }

    def num_documents(self) -> int | None:
        """The rows of the split, where the dataset's card says so."""
        splits = self._rows.info.splits or {}
        return splits[self.split].num_examples or None if self.split in splits else None


class HubReading:
    """A pass over a `HubSource`."""

    def __init__(
        self, source: HubSource, rows: IterableDataset, position: Mapping[str, Any]
    ) -> None:
        """Begin at `position`, which the library reaches without reading what lies before."""
        self._source, self._rows, self._begin = source, rows, copy.deepcopy(dict(position))
        self._number = int(position["documents"])
        rows.load_state_dict(copy.deepcopy(dict(position["state"])))

    def __iter__(self) -> Iterator[Document | BadRow]:
        """Yield the documents, called `split:number`. Raises `MorError` where reading fails."""
        source = self._source
        stream = iter(self._rows)
        while True:
            origin = f"{source.split}:{self._number + 1}"
            try:
                row = next(stream, None)
            except Exception as error:
                raise MorError(f"{source} fails at document {origin}: {_line(error)}") from error
            if row is None:
                return
            self._number += 1
            for value in column_values(row.column(0)):  # one: a table of a single row
                yield row_of(value, origin, f"{source}:{self._number}", source.text_field)

    def position(self) -> Mapping[str, Any]:
        """Documents read, and the library's own state."""
        if self._number == self._begin["documents"]:
            return self._begin  # until a row is read, the library tells of an earlier pass
        return {"documents": self._number, "state": self._rows.state_dict()}


def _commit(name: str, revision: str | None) -> str:
    """The commit that `revision` of a dataset names now."""
    from huggingface_hub import HfApi

    found = HfApi().dataset_info(name, revision=revision).sha
    if not found:
        raise ValueError(f"the hub names no commit for {name}")
    return found


def _line(error: Exception) -> str:
    return " ".join((str(error) or type(error).__name__).split())
