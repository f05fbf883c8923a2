"""A document: the unit that texts are read, split and packed by."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mor.errors import MorError

# The two lines that Project Gutenberg puts around the work itself; all else is its licence.
_GUTENBERG_START, _GUTENBERG_END = (
    re.compile(rf"^\*\*\* ?{word} OF TH(E|IS) PROJECT GUTENBERG EBOOK[^*]*\*\*\*", re.M | re.I)
    for word in ("START", "END")
)


@dataclass(frozen=True)
class Document:
    """One text with a stable name, unique in its source: a play, a file, a line of a JSON file."""

    name: str
    text: str


KINDS = (
    "null",
    "missing",
    "not text",
    "broken surrogate",
    "undecodable bytes",
    "invalid JSON",
    "not an object",
)
"""What can be wrong with a row (a line, a row of a table, a text file)."""


class BadRow(MorError):
    """A row that gives no text. A reader yields it in its place; who reads raises or counts it.

    Attributes:
        kind: one of `KINDS`.
    """

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


def describe_skipped(skipped: Mapping[str, int]) -> str:
    """Counts of bad rows for people: `3 bad rows skipped (2 null, 1 missing)`."""
    total = sum(skipped.values())
    parts = ", ".join(f"{skipped[kind]:,} {kind}" for kind in KINDS if skipped.get(kind))
    return f"{total:,} bad row{'' if total == 1 else 's'} skipped ({parts})" if total else ""


def check_text(value: Any, origin: str, text_field: str) -> str:
    """Return `value` if it is a string of valid Unicode.

    Raises:
        BadRow: null, something else than text, or half of a surrogate pair; it names `origin`.
    """
    if value is None:
        raise BadRow("null", f"{origin}: field {text_field!r} is null, expected a string")
    if not isinstance(value, str):
        raise BadRow(
            "not text",
            f"{origin}: field {text_field!r} is {type(value).__name__}, expected a string",
        )
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:  # half of a surrogate pair, escaped
        raise BadRow(
            "broken surrogate", f"{origin}: field {text_field!r} is not valid Unicode: {error}"
        ) from error
    return value


def decode_text(data: bytes, origin: str) -> str:
    r"""Decode a UTF-8 text file as it is to be learned from.

    A byte order mark is dropped, line ends become `\n`, and the header and licence of a Project
    Gutenberg book are left out where both of its marker lines are there.

    Raises:
        BadRow: the bytes are not UTF-8; the message names `origin` and the byte offset.
    """
    text = decode_utf8(data, origin).removeprefix("\ufeff")
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    start, end = _GUTENBERG_START.search(text), _GUTENBERG_END.search(text)
    if start and end and start.end() < end.start():
        text = text[start.end() : end.start()].strip("\n") + "\n"
    return text


def decode_utf8(data: bytes, origin: str, offset: int = 0, line: int | None = None) -> str:
    """Decode UTF-8 strictly; `offset` is where `data` starts in the file that `origin` names.

    Raises:
        BadRow: the bytes are not UTF-8; the message names `origin` and the byte offset.
    """
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        where = "" if line is None else f"line {line}, "
        raise BadRow(
            "undecodable bytes",
            f"{origin} is not UTF-8: {where}byte {data[error.start]:#04x} at offset "
            f"{offset + error.start} ({error.reason}); convert the file to UTF-8 first",
        ) from error
