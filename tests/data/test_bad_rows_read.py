"""Rows that cannot be used, of files of every kind: refused by name, or passed over."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from mor.data import BadRow, iter_documents
from mor.data.documents import KINDS, Document
from mor.data.hub import HubSource
from mor.data.sources import FileSource, Source, iter_rows
from tests.data.bad_rows import BAD_LINES, COMPRESS, write_table

# What is read ------------------------------------------------------------------------------------


def test_every_kind_has_a_line_here() -> None:
    assert set(BAD_LINES) == set(KINDS)


@pytest.mark.parametrize("suffix", list(COMPRESS))
@pytest.mark.parametrize("kind", KINDS)
def test_a_bad_line_is_refused_by_name_and_passed_over_by_kind(
    tmp_path: Path, kind: str, suffix: str
) -> None:
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(COMPRESS[suffix](b'{"text": "x"}\n' + BAD_LINES[kind] + b'\n{"text": ""}\n'))
    with pytest.raises(BadRow, match=r"a\.jsonl.*(:2|line 2)") as caught:
        list(iter_documents(path))
    assert caught.value.kind == kind
    caught.value.args[0].encode()  # fit to be printed
    found = list(iter_rows(path))
    assert [f.kind if isinstance(f, BadRow) else f for f in found] == [
        Document(f"{path.name}:1", "x"),
        kind,
        Document(f"{path.name}:3", ""),
    ]


@pytest.mark.parametrize("suffix", list(COMPRESS))
@pytest.mark.parametrize("name", ["a.txt", "a.md"])
def test_a_text_file_that_is_not_utf8(tmp_path: Path, name: str, suffix: str) -> None:
    path = tmp_path / (name + suffix)
    path.write_bytes(COMPRESS[suffix](b"good \xff"))
    with pytest.raises(BadRow, match=r"a\.(txt|md).* is not UTF-8: byte 0xff at offset 5"):
        list(iter_documents(path))
    assert [row.kind for row in iter_rows(path) if isinstance(row, BadRow)] == ["undecodable bytes"]


@pytest.mark.parametrize("values", [[1, 2], [b"x"], [True], [["x"]], [{"x": "y"}]])
def test_a_column_that_is_no_text(tmp_path: Path, values: list[Any]) -> None:
    parquet.write_table(pyarrow.table({"text": values}), tmp_path / "a.parquet")
    rows = list(iter_rows(tmp_path))
    assert [row.kind for row in rows if isinstance(row, BadRow)] == ["not text"] * len(values)


def test_a_column_that_some_files_lack(tmp_path: Path) -> None:
    parquet.write_table(pyarrow.table({"text": ["x"]}), tmp_path / "a.parquet")
    parquet.write_table(pyarrow.table({"body": ["y", "z"]}), tmp_path / "b.parquet")
    with pytest.raises(BadRow, match=r"b\.parquet has no column 'text'; its columns: 'body'"):
        list(iter_documents(tmp_path))
    assert [r.kind for r in iter_rows(tmp_path) if isinstance(r, BadRow)] == ["missing"] * 2


_texts = st.one_of(
    st.text(max_size=8).map(str.encode),
    st.none(),
    st.just(b"\xed\xa0\x80"),  # a surrogate, encoded as if it were a character
    st.just(b"ok \xff"),
)


@settings(max_examples=25)
@given(values=st.lists(_texts, min_size=1, max_size=9))
def test_one_document_in_every_format(
    tmp_path_factory: pytest.TempPathFactory, values: list[bytes | None]
) -> None:
    """The same texts and the same refusals, from JSON lines, Parquet and the hub's form."""
    folder = tmp_path_factory.mktemp("formats")
    (folder / "hub").mkdir()
    write_table(folder / "a.parquet", values)
    write_table(folder / "hub" / "train.parquet", values)
    lines = [
        b'{"text": null}'
        if value is None
        else b'{"text": "' + value + b'"}'
        if _broken(value)
        else json.dumps({"text": value.decode()}).encode()
        for value in values
    ]
    (folder / "a.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    sources: list[Source] = [
        FileSource(folder / "a.jsonl"),
        FileSource(folder / "a.parquet"),
        HubSource(str(folder / "hub")),
    ]
    expected = [
        "null" if v is None else "undecodable bytes" if _broken(v) else (v.decode(),)
        for v in values
    ]
    for source in sources:
        found = list(source.read())
        assert [r.kind if isinstance(r, BadRow) else (r.text,) for r in found] == expected
        for row, (number, _) in zip(found, enumerate(values, 1), strict=True):
            name = str(row) if isinstance(row, BadRow) else row.name
            assert f":{number}" in name or f"line {number}" in name


def _broken(value: bytes) -> bool:
    try:
        value.decode()
    except UnicodeDecodeError:
        return True
    return False


@pytest.mark.parametrize("form", ["jsonl", "parquet", "hub"])
def test_a_pass_is_taken_up_at_any_row(tmp_path: Path, form: str) -> None:
    values: list[bytes | None] = [b"a", None, b"\xff", b"", b"b", None, None, b"c", b"d", b"\xfe"]
    if form == "jsonl":
        lines = [b"null" if v is None else b'{"text": "' + v + b'"}' for v in values]
        (tmp_path / "a.jsonl").write_bytes(b"\n\n".join(lines))
    else:
        write_table(tmp_path / "train.parquet", values)
    source: Source = HubSource(str(tmp_path)) if form == "hub" else FileSource(tmp_path)

    def told(row: Document | BadRow) -> str:
        return row.kind if isinstance(row, BadRow) else row.text

    whole = [told(row) for row in source.read()]
    assert len(whole) == len(values)
    for stop in range(len(values) + 1):
        reading = source.read()
        rows = iter(reading)
        first = [told(next(rows)) for _ in range(stop)]
        assert [*first, *map(told, source.read(reading.position()))] == whole
