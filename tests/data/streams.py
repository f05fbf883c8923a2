"""Texts, tables and datasets that are read in one pass."""

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
    "gz": gzip.compress,
    "bz2": bz2.compress,
    "xz": lzma.compress,
    "zst": zstd.compress,
}
LINES = b'{"text": "one"}\n\n{"text": "two"}\n'


def texts(count: int, offset: int = 0) -> list[str]:
    return [f"Document {n + offset} says that the night is long. " * 3 for n in range(count)]


def write_parquet(path: Path, values: list[str | None], rows_per_group: int = 4) -> None:
    table = pyarrow.table({"id": list(map(str, range(len(values)))), "text": values})
    parquet.write_table(table, path, row_group_size=rows_per_group)
