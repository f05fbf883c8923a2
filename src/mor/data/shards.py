r"""Token shards: one binary file of token ids with its document boundaries, read by memory map.

Layout, all little-endian:

| bytes | content |
|---|---|
| 64 | header: magic `MORTOKEN`, version, bytes per token (2 or 4), vocabulary size, number of tokens, of documents, of text bytes, of name bytes, CRC-32 of the header so far |
| tokens x 2 or 4 | the token ids, document after document, unsigned |
| 0 to 7 | zeros, up to a multiple of 8 |
| (documents + 1) x 8 | where each document starts, in tokens; the last is the number of tokens |
| name bytes | the documents' names, a JSON list |

A token takes 2 bytes where the vocabulary allows it (65,536 or less). Opening a shard checks the
header and the file size, which is cheap; `verify` checks every byte against a SHA-256.
"""  # noqa: E501 (a table row cannot be broken)

from __future__ import annotations

import json
import mmap
import os
import struct
import zlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from mor.disk import digest
from mor.errors import MorError

MAGIC = b"MORTOKEN"
VERSION = 1
HEADER_BYTES = 64
_HEADER = struct.Struct("<8sIIQQQQQ")
_CRC = struct.Struct("<4xI")
_DTYPES: dict[int, np.dtype[np.unsignedinteger]] = {2: np.dtype("<u2"), 4: np.dtype("<u4")}


@dataclass(frozen=True)
class ShardInfo:
    """What the index says of one shard. `num_bytes` is the UTF-8 length of the text it encodes."""

    file: str
    num_tokens: int
    num_documents: int
    num_bytes: int
    sha256: str


def token_dtype(vocab_size: int) -> np.dtype[np.unsignedinteger]:
    """The smallest unsigned type that holds every id below `vocab_size`."""
    return _DTYPES[2 if vocab_size <= 2**16 else 4]


def pack_header(
    *,
    itemsize: int,
    vocab_size: int,
    num_tokens: int,
    num_documents: int,
    num_bytes: int,
    name_bytes: int,
) -> bytes:
    """The 64 bytes a shard begins with."""
    header = _HEADER.pack(
        *(MAGIC, VERSION, itemsize, vocab_size, num_tokens, num_documents, num_bytes, name_bytes)
    )
    return header + _CRC.pack(zlib.crc32(header))


def padding(payload: int) -> int:
    """Zero bytes after `payload` bytes of tokens, so that the boundaries are aligned."""
    return -payload % 8


class TokenShard:
    """One shard, opened for reading by memory map. It pickles as its path.

    Attributes:
        num_tokens, num_documents, num_bytes: totals; bytes are those of the text it encodes.
        vocab_size: every token id is below this.
        tokens: `[num_tokens]`, uint16 or uint32, read from the disk as it is touched.
        starts: `[num_documents + 1]`, uint64; document i is `tokens[starts[i]:starts[i + 1]]`.
    """

    def __init__(self, path: str | Path) -> None:
        """Open and check header and size.

        Raises:
            MorError: the file is missing, is no shard, is of another version, or is cut short;
                the message names the file.
        """
        self.path = Path(path)
        try:
            with self.path.open("rb") as stream:
                header = stream.read(HEADER_BYTES)
                size = os.fstat(stream.fileno()).st_size
                self._check_header(header)
                self._check_size(size)
                memory = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise MorError(f"cannot read shard {self.path}: {error.strerror or error}") from error
        self.tokens = np.frombuffer(memory, self._dtype, self.num_tokens, HEADER_BYTES)
        self.starts = np.frombuffer(memory, "<u8", self.num_documents + 1, self._starts_at)
        if self.starts[0] != 0 or self.starts[-1] != self.num_tokens:
            raise MorError(f"shard {self.path} is damaged: its document boundaries do not add up")

    def _check_header(self, header: bytes) -> None:
        if not header.startswith(MAGIC):
            raise MorError(
                f"{self.path} is not a token shard: it starts with {header[:8]!r}, "
                f"expected {MAGIC!r}"
            )
        if len(header) < HEADER_BYTES:
            raise MorError(f"shard {self.path} is cut short: its header is incomplete")
        _, version, itemsize, self.vocab_size, *counts = _HEADER.unpack_from(header)
        if version != VERSION:
            raise MorError(
                f"shard {self.path} has version {version}, this program reads {VERSION}; "
                f"prepare the data again"
            )
        (crc,) = _CRC.unpack_from(header, _HEADER.size)
        if crc != zlib.crc32(header[: _HEADER.size]) or itemsize not in _DTYPES:
            raise MorError(f"shard {self.path} is damaged: its header fails its checksum")
        self.num_tokens, self.num_documents, self.num_bytes, self._name_bytes = counts
        self._dtype = _DTYPES[itemsize]

    def _check_size(self, size: int) -> None:
        payload = self.num_tokens * self._dtype.itemsize
        self._starts_at = HEADER_BYTES + payload + padding(payload)
        self._names_at = self._starts_at + 8 * (self.num_documents + 1)
        expected = self._names_at + self._name_bytes
        if size != expected:
            what = "cut short" if size < expected else "too long"
            raise MorError(f"shard {self.path} is {what}: {size} bytes, expected {expected}")

    @cached_property
    def names(self) -> list[str]:
        """The documents' names, `[num_documents]`. Raises `MorError` if they cannot be read."""
        try:
            with self.path.open("rb") as stream:
                stream.seek(self._names_at)
                names = json.loads(stream.read(self._name_bytes))
            if isinstance(names, list) and len(names) == self.num_documents:
                return names
        except (OSError, ValueError) as error:
            raise MorError(f"shard {self.path} is damaged: names unreadable: {error}") from error
        raise MorError(f"shard {self.path} is damaged: expected {self.num_documents} names")

    def document(self, index: int) -> np.ndarray:
        """The tokens of document `index`, `[its length]`."""
        return self.tokens[int(self.starts[index]) : int(self.starts[index + 1])]

    def verify(self, sha256: str, remedy: str = "prepare the data again") -> None:
        """Read the whole file and compare.

        Raises:
            MorError: a single byte differs, or it cannot be read; `remedy` says what to do then.
        """
        try:
            found = digest(self.path)
        except OSError as error:
            raise MorError(f"cannot read shard {self.path}: {error.strerror or error}") from error
        if found != sha256:
            raise MorError(
                f"shard {self.path} is damaged: its SHA-256 is {found}, expected {sha256}; {remedy}"
            )

    def __reduce__(self) -> tuple[type[TokenShard], tuple[Path]]:
        """Pickle as the path, so that a data loader's workers open the file themselves."""
        return TokenShard, (self.path,)
