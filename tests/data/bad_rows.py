"""Rows that cannot be used."""

from __future__ import annotations

import bz2
import gzip
import lzma
from collections.abc import Callable
from pathlib import Path

import pyarrow
from backports import zstd
from pyarrow import parquet

COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "": lambda data: data,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": zstd.compress,
}
BAD_LINES = {
    "null": b'{"text": null}',
    "missing": b'{"body": "x"}',
    "not text": b'{"text": 3}',
    "broken surrogate": rb'{"text": "a \ud800 b"}',
    "undecodable bytes": b'{"text": "\xff\xfe"}',
    "invalid JSON": b'{"text": ',
    "not an object": b'["text"]',
}
GOOD = [f"Line {number} says that the night is long. " * 3 for number in range(14)]


def column(values: list[bytes | None]) -> pyarrow.Array:
    """A column of strings that may hold any bytes, as a careless writer makes it."""
    raw = pyarrow.array(values, type=pyarrow.binary())
    return pyarrow.Array.from_buffers(pyarrow.string(), len(values), raw.buffers())


def write_table(path: Path, values: list[bytes | None], rows_per_group: int = 3) -> None:
    parquet.write_table(
        pyarrow.table({"text": column(values)}), path, row_group_size=rows_per_group
    )
