"""Documents of one local file: plain text, JSON (lines or an array), Parquet; compressed or not.

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
from pathlib import Path
from typing import IO, Any

from mor.data.documents import BadRow, Document, check_text, decode_text, decode_utf8
from mor.data.extras import need_extra
from mor.data.tables import rows_of
from mor.errors import MorError

TEXT_SUFFIXES = (".txt", ".md")
LINES_SUFFIX, JSON_SUFFIX, PARQUET_SUFFIX = ".jsonl", ".json", ".parquet"
SUFFIXES = (*TEXT_SUFFIXES, LINES_SUFFIX, JSON_SUFFIX, PARQUET_SUFFIX)


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


def kind_of(path: Path) -> str | None:
    """The suffix that says what `path` holds, compression left out; None if it is not ours."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in _OPENERS:
        inner = suffixes[-2] if len(suffixes) > 1 else ""
        return inner if inner in SUFFIXES[:-1] else None
    return suffixes[-1] if suffixes and suffixes[-1] in SUFFIXES else None


def known_kinds() -> str:
    """For messages: `.txt, ... or .parquet`, and what they may be compressed with."""
    return (
        ", ".join(SUFFIXES[:-1])
        + f" or {SUFFIXES[-1]}; all but the last also with {', '.join(_OPENERS)}"
    )


def documents_of(
    path: Path, name: str, text_field: str, skip: int = 0
) -> Iterator[Document | BadRow]:
    """Yield the documents of one file, the first `skip` rows left out.

    A text file is one document called `name`; a line or row is `name:number`, counted from 1. A
    row that gives no text is a `BadRow` in its place. An empty string is a document without text.

    Raises:
        MorError: damaged compression or Parquet; the message names the file. An `OSError` passes
            where the system cannot read it.
    """
    kind = kind_of(path)
    try:
        if kind in TEXT_SUFFIXES:
            if not skip:
                with _open(path) as stream:
                    yield _whole(stream.read(), path, name)
        elif kind == JSON_SUFFIX and holds_array(path):
            yield from _elements(path, name, text_field, skip)
        elif kind in (LINES_SUFFIX, JSON_SUFFIX):
            yield from _lines(path, name, text_field, skip)
        else:
            yield from rows_of(path, name, text_field, skip)
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


def _whole(data: bytes, path: Path, name: str) -> Document | BadRow:
    try:
        return Document(name, decode_text(data, str(path)))
    except BadRow as bad:
        return bad


def _lines(path: Path, name: str, text_field: str, skip: int) -> Iterator[Document | BadRow]:
    """The lines of a file; blank ones are no rows, whatever stands before them is passed over."""
    offset = 0
    with _open(path) as stream:
        for number, line in enumerate(stream, start=1):
            begin, offset = offset, offset + len(line)
            line = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
            begin = offset - len(line)
            if _is_blank(line):
                continue
            if skip:
                skip -= 1
                continue
            try:
                text = decode_utf8(line, str(path), begin, number)
                yield Document(f"{name}:{number}", _field(text, f"{path}:{number}", text_field))
            except BadRow as bad:
                yield bad


def holds_array(path: Path) -> bool:
    """Whether a `.json` file begins as an array does; others hold lines, or something else.

    True of one that cannot be decompressed: reading it will say so.
    """
    try:
        with _open(path) as stream:
            begin = stream.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()
    except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile):
        return True
    return begin.startswith(b"[")


def _elements(path: Path, name: str, text_field: str, skip: int) -> Iterator[Document | BadRow]:
    """The elements of an array, numbered from 1; the file is read whole.

    An array that is cut short or wrong anywhere gives no row at all, and one `BadRow`.
    """
    with _open(path) as stream:
        data = stream.read().removeprefix(b"\xef\xbb\xbf")
    try:
        records: Any = json.loads(decode_utf8(data, str(path)))
    except (ValueError, RecursionError) as error:
        yield BadRow("invalid JSON", f"{path} is not valid JSON: {error}")
        return
    except BadRow as bad:
        yield bad
        return
    for number, record in enumerate(records[skip:], start=skip + 1):
        try:
            text = _text_of(record, f"{path}:{number}", text_field)
            yield Document(f"{name}:{number}", text)
        except BadRow as bad:
            yield bad


def _is_blank(line: bytes) -> bool:
    """Whether a line holds nothing but white space, that of Unicode included."""
    if not line.strip():
        return True
    if line[0] < 0x80 and not line[:1].isspace() and line[0] > 0x1F:
        return False  # nearly every line: no need to decode it
    try:
        return not line.decode("utf-8").strip()
    except UnicodeDecodeError:
        return False


def _field(line: str, origin: str, text_field: str) -> str:
    try:
        record: Any = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise BadRow("invalid JSON", f"{origin} is not valid JSON: {error}") from error
    return _text_of(record, origin, text_field)


def _text_of(record: Any, origin: str, text_field: str) -> str:
    if not isinstance(record, dict):
        raise BadRow(
            "not an object", f"{origin} holds a JSON {type(record).__name__}, expected an object"
        )
    if text_field not in record:
        fields = ", ".join(map(repr, record)) or "none"
        raise BadRow("missing", f"{origin} has no field {text_field!r}; its fields: {fields}")
    return check_text(record[text_field], origin, text_field)
