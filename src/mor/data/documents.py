"""A document: the unit that texts are read, split and packed by."""

from __future__ import annotations

import re
from dataclasses import dataclass

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


def decode_text(data: bytes, origin: str) -> str:
    r"""Decode a UTF-8 text file as it is to be learned from.

    A byte order mark is dropped, line ends become `\n`, and the header and licence of a Project
    Gutenberg book are left out where both of its marker lines are there.

    Raises:
        MorError: the bytes are not UTF-8; the message names `origin` and the byte offset.
    """
    text = decode_utf8(data, origin).removeprefix("\ufeff")
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    start, end = _GUTENBERG_START.search(text), _GUTENBERG_END.search(text)
    if start and end and start.end() < end.start():
        text = text[start.end() : end.start()].strip("\n") + "\n"
    return text


def decode_utf8(data: bytes, origin: str, offset: int = 0) -> str:
    """Decode UTF-8 strictly; `offset` is where `data` starts in the file that `origin` names.

    Raises:
        MorError: the bytes are not UTF-8; the message names `origin` and the byte offset.
    """
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise MorError(
            f"{origin} is not UTF-8: byte {data[error.start]:#04x} at offset "
            f"{offset + error.start} ({error.reason}); convert the file to UTF-8 first"
        ) from error
