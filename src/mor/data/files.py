"""Documents of one local file: plain text, JSON lines or Parquet, compressed or not.

Each reader yields documents from the `skip`-th on, passing over the earlier ones as cheaply as the
format allows, so that a preparation which was killed goes on where it stopped.
"""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import zlib
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import IO, Any

from mor.data.documents import Document, decode_text, decode_utf8
from mor.errors import MorError

TEXT_SUFFIXES = (".txt", ".md")
LINES_SUFFIX, PARQUET_SUFFIX = ".jsonl", ".parquet"
SUFFIXES = (*TEXT_SUFFIXES, LINES_SUFFIX, PARQUET_SUFFIX)
_PARQUET_ROWS = 512  # decoded at a time: some megabytes of web text


def _open_zstd(path: Path) -> Any:
    try:
        # The standard library's module of Python 3.14, for older ones. Unlike other bindings it
        # says so when a file ends in the middle of a frame.
        from backports import zstd
    except ImportError:
        raise need_extra(f"{path}: .zst files", "backports.zstd") from None
    return zstd.open(path, "rb")


_OPENERS: dict[str, Callable[[Path], Any]] = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".zst": _open_zstd,
}


def need_extra(what: str, package: str) -> MorError:
    """The error to raise where a package of the extra `data` is not installed."""
    return MorError(f"{what} need the package {package}: pip install 'mixture-of-recursions[data]'")


def kind_of(path: Path) -> str | None:
    """The suffix that says what `path` holds, compression left out; None if it is not ours."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in _OPENERS:
        inner = suffixes[-2] if len(suffixes) > 1 else ""
        return inner if inner in (*TEXT_SUFFIXES, LINES_SUFFIX) else None
    return suffixes[-1] if suffixes and suffixes[-1] in SUFFIXES else None


def known_kinds() -> str:
    """For messages: `.txt, .md, .jsonl or .parquet`, and what they may be compressed with."""
    return (
        ", ".join(SUFFIXES[:-1])
        + f" or {SUFFIXES[-1]}; the first three also with {', '.join(_OPENERS)}"
    )


def documents_of(path: Path, name: str, text_field: str, skip: int = 0) -> Iterator[Document]:
    """Yield the documents of one file, the first `skip` left out.

    A text file is one document called `name`; a line or row is `name:number`, counted from 1.

    Raises:
        MorError: not UTF-8, a wrong line or row, or damaged compression; the message names the
            file. An `OSError` passes where the system cannot read it.
    """
    kind = kind_of(path)
    try:
        if kind in TEXT_SUFFIXES:
            if not skip:
                with _open(path) as stream:
                    yield Document(name, decode_text(stream.read(), str(path)))
        elif kind == LINES_SUFFIX:
            yield from _lines(path, name, text_field, skip)
        else:
            yield from _rows(path, name, text_field, skip)
    except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile) as error:
        raise _damaged(path, error) from error
    except OSError as error:
        if error.errno is not None:
            raise
        raise _damaged(path, error) from error  # bz2's way to say that a file is none of its own
    except Exception as error:
        if type(error).__name__ != "ZstdError":  # imported only where a .zst is opened
            raise
        raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> MorError:
    return MorError(
        f"{path} cannot be decompressed: {str(error) or type(error).__name__}; it is damaged or "
        f"cut short, so fetch it again"
    )


def _open(path: Path) -> IO[bytes]:
    opener = _OPENERS.get(path.suffix.lower())
    stream: IO[bytes] = opener(path) if opener else path.open("rb")
    return stream


def _lines(path: Path, name: str, text_field: str, skip: int) -> Iterator[Document]:
    offset = 0
    with _open(path) as stream:
        for number, line in enumerate(stream, start=1):
            text = decode_utf8(line, str(path), offset)
            text = text.removeprefix("\ufeff") if offset == 0 else text
            if text.strip():
                if skip:
                    skip -= 1
                else:
                    yield Document(f"{name}:{number}", _field(text, f"{path}:{number}", text_field))
            offset += len(line)


def _field(line: str, origin: str, text_field: str) -> str:
    try:
        record: Any = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise MorError(f"{origin} is not valid JSON: {error}") from error
    if not isinstance(record, dict):
        raise MorError(f"{origin} holds a JSON {type(record).__name__}, expected an object")
    if text_field not in record:
        fields = ", ".join(map(repr, record)) or "none"
        raise MorError(f"{origin} has no field {text_field!r}; its fields: {fields}")
    return checked_text(record[text_field], origin, text_field)


def checked_text(value: Any, origin: str, text_field: str) -> str:
    """Return `value` if it is a string of valid Unicode. Raises `MorError` naming `origin`."""
    if not isinstance(value, str):
        raise MorError(
            f"{origin}: field {text_field!r} is {type(value).__name__}, expected a string"
        )
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:  # half of a surrogate pair, escaped
        raise MorError(f"{origin}: field {text_field!r} is not valid Unicode: {error}") from error
    return value


def _rows(path: Path, name: str, text_field: str, skip: int) -> Iterator[Document]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise need_extra(f"{path}: .parquet files", "pyarrow") from None
    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            fields = file.schema_arrow.names
            if text_field not in fields:
                raise MorError(
                    f"{path} has no column {text_field!r}; its columns: "
                    f"{', '.join(map(repr, fields)) or 'none'}"
                )
            groups: list[int] = []
            for group in range(file.num_row_groups):  # whole row groups are passed over unread
                rows = file.metadata.row_group(group).num_rows
                if not groups and number + rows <= skip:
                    number += rows
                else:
                    groups.append(group)
            batches = file.iter_batches(_PARQUET_ROWS, groups, columns=[text_field])
            texts = (text for batch in batches for text in batch.column(0).to_pylist())
            for text in islice(texts, skip - number, None) if groups else ():
                skip += 1
                # A missing value is a document without text, and counted as such.
                text = "" if text is None else checked_text(text, f"{path}:{skip}", text_field)
                yield Document(f"{name}:{skip}", text)
    except pyarrow.ArrowException as error:
        raise MorError(f"{path} is not a whole Parquet file: {error}; fetch it again") from error
