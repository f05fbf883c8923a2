"""Texts of a column: Parquet files, and Arrow values from wherever they come."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from mor.data.documents import BadRow, Document, check_text
from mor.data.extras import need_extra
from mor.errors import MorError

_ROWS = 512  # decoded at a time: some megabytes of web text


def rows_of(path: Path, name: str, text_field: str, skip: int) -> Iterator[Document | BadRow]:
    """Yield the rows of a Parquet file, the first `skip` left out.

    Raises:
        MorError: the file is damaged, or pyarrow is not installed.
    """
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
                names = ", ".join(map(repr, fields)) or "none"
                for _ in range(skip, file.metadata.num_rows):
                    yield BadRow(
                        "missing", f"{path} has no column {text_field!r}; its columns: {names}"
                    )
                return
            groups: list[int] = []
            for group in range(file.num_row_groups):  # whole row groups are passed over unread
                rows = file.metadata.row_group(group).num_rows
                if not groups and number + rows <= skip:
                    number += rows
                else:
                    groups.append(group)
            batches = file.iter_batches(_ROWS, groups, columns=[text_field])
            values = (value for batch in batches for value in column_values(batch.column(0)))
            for value in islice(values, skip - number, None) if groups else ():
                skip += 1
                yield row_of(value, f"{name}:{skip}", f"{path}:{skip}", text_field)
    except pyarrow.ArrowException as error:
        raise MorError(f"{path} is not a whole Parquet file: {error}; fetch it again") from error


def column_values(column: Any) -> list[Any]:
    """The Python values of an Arrow array; where one cannot be read, why, in its place."""
    try:
        values: list[Any] = column.to_pylist()
    except (UnicodeDecodeError, ValueError, OverflowError):  # one of them, so one by one
        return [_value(scalar) for scalar in column]
    return values


def _value(scalar: Any) -> Any:
    try:
        return scalar.as_py()
    except (UnicodeDecodeError, ValueError, OverflowError) as error:
        return error


def row_of(value: Any, name: str, origin: str, text_field: str) -> Document | BadRow:
    """A value of `column_values` as a document called `name`, or what is wrong with it."""
    if isinstance(value, UnicodeDecodeError):
        return BadRow("undecodable bytes", f"{origin}: field {text_field!r} is not UTF-8: {value}")
    if isinstance(value, Exception):
        return BadRow("not text", f"{origin}: field {text_field!r} is no string: {value}")
    try:
        return Document(name, check_text(value, origin, text_field))
    except BadRow as bad:
        return bad
