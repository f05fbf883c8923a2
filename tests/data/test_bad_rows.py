"""Rows that give no text: one rule for every kind of source."""

from __future__ import annotations

import gzip
import io
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from mor.data import BadRow, DataIndex, Limits, StreamOptions, prepare
from mor.data import encoding as encoding_module
from mor.data.documents import KINDS, describe_skipped
from mor.data.progress import console_progress
from mor.data.tokenizer import train_tokenizer
from mor.errors import MorError
from tests.data.bad_rows import BAD_LINES, GOOD, write_table


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
