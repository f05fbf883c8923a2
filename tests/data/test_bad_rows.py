"""Rows that give no text: one rule for every kind of source."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from backports import zstd
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet
from rich.console import Console

from mor.data import BadRow, DataIndex, Limits, StreamOptions, iter_documents, prepare
from mor.data import encoding as encoding_module
from mor.data.documents import KINDS, Document, describe_skipped
from mor.data.hub import HubSource
from mor.data.progress import console_progress
from mor.data.sources import FileSource, Source, iter_rows
from mor.data.tokenizer import train_tokenizer
from mor.errors import MorError

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


def mixed_lines(kinds: list[str]) -> bytes:
    """Good lines with a bad one after each of the first."""
    lines: list[bytes] = []
    for number, text in enumerate(GOOD):
        lines.append(json.dumps({"text": text}).encode())
        if number < len(kinds):
            lines.append(BAD_LINES[kinds[number]])
    return b"\n".join(lines) + b"\n"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(GOOD, 300).save_pretrained(folder)
    return folder


def content(out: Path) -> dict[str, bytes]:
    return {str(p.relative_to(out)): p.read_bytes() for p in out.rglob("*") if p.is_file()}


def shards(out: Path) -> dict[str, bytes]:
    return {name: data for name, data in content(out).items() if name.endswith(".bin")}


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


# What is prepared --------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
def test_refused_by_default_and_counted_on_demand(
    tokenizer: Path, tmp_path: Path, stream: bool
) -> None:
    kinds = [*KINDS, "null", "null", "missing"]
    for name, data in (("bad", mixed_lines(kinds)), ("good", mixed_lines([]))):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.jsonl").write_bytes(data)
    how: dict[str, Any] = {"tokenizer": tokenizer, "stream": stream, "validation_fraction": 0.3}
    with pytest.raises(BadRow, match=r"a\.jsonl:2: field 'text' is null"):
        prepare(tmp_path / "bad", tmp_path / "out", **how)
    assert not (tmp_path / "out").exists()
    index = prepare(tmp_path / "bad", tmp_path / "out", skip_bad_rows=True, **how)
    assert index.skipped == Counter(kinds) == DataIndex.load(tmp_path / "out").skipped
    assert index.num_empty == 0
    again = prepare(tmp_path / "bad", tmp_path / "out", skip_bad_rows=True, **how)
    assert again.reused
    assert again.skipped == index.skipped
    with pytest.raises(MorError, match=r"bad rows (left out|skipped)|field 'text' is null"):
        prepare(tmp_path / "bad", tmp_path / "out", **how)
    good = prepare(tmp_path / "good", tmp_path / "fine", **how)
    assert good.skipped == {}
    for split in index.splits:
        assert [s.num_tokens for s in index.shards(split)] == [
            s.num_tokens for s in good.shards(split)
        ] or not stream  # a survey chooses by name, which counts lines
    total = sum(index.num_tokens(split) for split in index.splits)
    assert total == sum(good.num_tokens(split) for split in good.splits)


def test_every_kind_of_source_counts(tokenizer: Path, tmp_path: Path) -> None:
    source = tmp_path / "in"
    source.mkdir()
    (source / "a.jsonl.gz").write_bytes(gzip.compress(mixed_lines(["null", "invalid JSON"])))
    write_table(source / "b.parquet", [b"one of them", None, b"\xff", b"two of them"])
    (source / "c.txt").write_bytes(b"\xfe")
    index = prepare(
        source, tmp_path / "out", tokenizer=tokenizer, stream=True, validation_fraction=0.3,
        skip_bad_rows=True,
    )  # fmt: skip
    assert index.skipped == {"null": 2, "invalid JSON": 1, "undecodable bytes": 2}
    assert describe_skipped(index.skipped) == (
        "5 bad rows skipped (2 null, 2 undecodable bytes, 1 invalid JSON)"
    )


@pytest.mark.parametrize(
    ("form", "workers"), [("jsonl", 0), ("parquet", 0), ("hub", 0), ("jsonl", 2)]
)
def test_a_stopped_preparation_goes_on_with_the_right_counts(
    tokenizer: Path, tmp_path: Path, form: str, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "in"
    source.mkdir()
    kinds = ["null", "not text", "null", "missing", "undecodable bytes", "null", "invalid JSON"]
    if form == "jsonl":
        (source / "a.jsonl").write_bytes(mixed_lines(kinds))
    else:
        values: list[bytes | None] = []
        for number, text in enumerate(GOOD):
            values += [text.encode(), None if number % 2 else b"\xff"]
        write_table(source / "train.parquet", values)
    name = f"hf:{source}" if form == "hub" else source
    monkeypatch.setattr(encoding_module, "_BATCH_DOCUMENTS", 3)
    how: dict[str, Any] = {
        "tokenizer": tokenizer, "stream": True, "validation_fraction": 0.3, "shard_tokens": 120,
        "skip_bad_rows": True, "workers": workers,
    }  # fmt: skip
    whole = prepare(name, tmp_path / "whole", **how)
    assert sum(whole.skipped.values()) == (7 if form == "jsonl" else 14)

    class Stop(Exception):
        pass

    stops = 0
    for limit in (2, 4, 10**9) if workers else (1, 2, 3, 4, 6, 10**9):
        calls = 0

        def stop(stage: str, done: int, total: int | None, limit: int = limit) -> None:
            nonlocal calls
            calls += 1
            if calls > limit:
                raise Stop

        try:
            prepare(name, tmp_path / "parts", progress=stop, **how)
            break
        except Stop:
            stops += 1
    assert stops > 1
    ours, theirs = content(tmp_path / "parts"), content(tmp_path / "whole")
    assert ours == theirs


def test_a_preparation_that_met_a_bad_row_goes_on_by_skipping(
    tokenizer: Path, tmp_path: Path
) -> None:
    source = tmp_path / "a.jsonl"
    source.write_bytes(mixed_lines([]) + BAD_LINES["null"] + b"\n" + mixed_lines([]))
    how: dict[str, Any] = {
        "tokenizer": tokenizer, "stream": True, "validation_fraction": 0.3, "shard_tokens": 120,
    }  # fmt: skip
    with pytest.raises(BadRow, match=rf"a\.jsonl:{len(GOOD) + 1}: field 'text' is null"):
        prepare(source, tmp_path / "out", **how)
    assert (tmp_path / ".out.partial").is_dir()  # what was finished is kept
    index = prepare(source, tmp_path / "out", skip_bad_rows=True, **how)
    prepare(source, tmp_path / "whole", skip_bad_rows=True, **how)
    assert index.skipped == {"null": 1}
    assert shards(tmp_path / "out") == shards(tmp_path / "whole")


def test_rows_past_the_limit_do_not_matter(tokenizer: Path, tmp_path: Path) -> None:
    source = tmp_path / "a.jsonl"
    source.write_bytes(mixed_lines([]) + BAD_LINES["null"] + b"\n")
    options = StreamOptions(Limits(max_documents=len(GOOD)))
    index = prepare(
        source, tmp_path / "out", tokenizer=tokenizer, stream=options, validation_fraction=0.3
    )
    assert index.skipped == {}


def test_nothing_but_bad_rows(tokenizer: Path, tmp_path: Path) -> None:
    source = tmp_path / "a.jsonl"
    source.write_bytes(b'{"text": null}\n' * 3)
    with pytest.raises(MorError, match=r"holds no text.*3 bad rows skipped \(3 null\)"):
        prepare(source, tmp_path / "out", tokenizer=tokenizer, skip_bad_rows=True)
    with pytest.raises(MorError, match=r"gave no document.*3 bad rows skipped \(3 null\)"):
        prepare(source, tmp_path / "out", tokenizer=tokenizer, skip_bad_rows=True, stream=True)


def test_the_console_says_what_is_skipped(tokenizer: Path, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(mixed_lines(["null", "missing", "null"]))
    console = Console(record=True, width=200, file=io.StringIO())
    with console_progress(console) as progress:
        prepare(
            tmp_path / "a.jsonl",
            tmp_path / "out",
            tokenizer=tokenizer,
            skip_bad_rows=True,
            progress=progress,
        )
    assert "3 bad rows skipped (2 null, 1 missing)" in console.export_text()
