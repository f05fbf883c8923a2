"""Read vectors of strings that the R language saved (`serialize`, XDR form, versions 2 and 3).

R packages keep their data so. Only what a table of text is made of is read: strings, numbers,
lists, attributes and references to symbols; anything else is refused. Nothing is evaluated. The
format is described in the manual "R Internals", section 1.8.
"""

from __future__ import annotations

import struct
import zlib
from typing import Any

from mor.errors import MorError

_NIL, _REFERENCE, _GLOBAL = 254, 255, 253
_SYMBOL, _PAIRS, _CHARS, _LOGICAL, _INTEGER, _REAL, _STRINGS, _LIST = 1, 2, 9, 10, 13, 14, 16, 19
_HAS_ATTRIBUTES, _HAS_TAG = 0x200, 0x400


def read_rda(data: bytes, origin: str) -> dict[str, Any]:
    """The variables of an `.rda` file, uncompressed, by name.

    A data frame is a dictionary of its columns.

    Raises:
        MorError: the bytes are no such file, or hold something else than tables of text.
    """
    if data[:4] not in (b"RDX2", b"RDX3"):
        raise MorError(f"{origin} is no file of R's data (it begins with {data[:4]!r})")
    value = _Reader(data[5:], origin).value()
    return value if isinstance(value, dict) else {}


def read_rdb(data: bytes, origin: str) -> list[Any]:
    """The values of an `.rdb` file: each is 4 bytes of length, then a zlib stream.

    Raises:
        MorError: as `read_rda`.
    """
    values = []
    while data:
        stream = zlib.decompressobj()
        try:
            content = stream.decompress(data[4:])
        except zlib.error as error:
            raise MorError(f"{origin} is no database of R's ({error})") from error
        if not stream.eof:
            raise MorError(f"{origin} is cut short")
        values.append(_Reader(content, origin).value())
        data = stream.unused_data
    return values


class _Reader:
    """Reads one serialised value."""

    def __init__(self, data: bytes, origin: str) -> None:
        self.data, self.origin, self.place = data, origin, 0
        self.symbols: list[str] = []

    def value(self) -> Any:
        """Read the header and the value after it."""
        try:
            if self.take(2) != b"X\n":
                raise MorError(f"{self.origin} is not in R's XDR form")
            version = self.whole()
            self.take(8)
            if version == 3:
                self.take(self.whole())  # the native encoding
            return self.item()
        except struct.error as error:
            raise MorError(f"{self.origin} is cut short") from error

    def take(self, count: int) -> bytes:
        """The next `count` bytes."""
        part = self.data[self.place : self.place + count]
        if len(part) < count:
            raise MorError(f"{self.origin} is cut short")
        self.place += count
        return part

    def whole(self) -> int:
        """The next 4 bytes as a number."""
        return int(struct.unpack(">i", self.take(4))[0])

    def item(self) -> Any:
        """Read one item: None, a string, a list, or a dictionary where there are names."""
        flags = self.whole()
        kind = flags & 0xFF
        if kind in (_NIL, _GLOBAL):
            return None
        if kind == _REFERENCE:
            return self.symbols[(flags >> 8) - 1]
        if kind == _SYMBOL:
            self.symbols.append(str(self.item()))
            return self.symbols[-1]
        if kind == _CHARS:
            length = self.whole()
            return None if length < 0 else self.take(length).decode("utf-8")
        if kind == _PAIRS:
            return self.pairs(flags)
        values = self.vector(kind)
        names = self.item() if flags & _HAS_ATTRIBUTES else None
        if isinstance(names, dict) and kind == _LIST and isinstance(names.get("names"), list):
            return dict(zip(names["names"], values, strict=True))
        return values

    def vector(self, kind: int) -> list[Any]:
        """Read the elements of a vector."""
        length = self.whole()
        if kind in (_STRINGS, _LIST):
            return [self.item() for _ in range(length)]
        if kind in (_INTEGER, _LOGICAL):
            return list(struct.unpack(f">{length}i", self.take(4 * length)))
        if kind == _REAL:
            return list(struct.unpack(f">{length}d", self.take(8 * length)))
        raise MorError(f"{self.origin} holds a value of R's kind {kind}, expected tables of text")

    def pairs(self, flags: int) -> dict[str, Any]:
        """Read a chain of tagged values."""
        chain: dict[str, Any] = {}
        while flags & 0xFF == _PAIRS:
            if flags & _HAS_ATTRIBUTES:
                self.item()
            tag = self.item() if flags & _HAS_TAG else str(len(chain))
            chain[tag] = self.item()
            flags = self.whole()
        return chain
