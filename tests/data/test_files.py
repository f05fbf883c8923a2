"""Compressed files, tables, and reading that goes on from any position."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow
import pytest
from backports import zstd
from pyarrow import parquet

from mor.data import (
    Document,
    iter_documents,
)
from mor.data.hub import HubSource
from mor.data.sources import FileSource, Source
from mor.errors import MorError
from tests.data.streams import COMPRESS, LINES, texts, write_parquet

# Files -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", list(COMPRESS))
def test_compressed_files(tmp_path: Path, suffix: str) -> None:
    (tmp_path / f"a.jsonl.{suffix}").write_bytes(COMPRESS[suffix](LINES))
    (tmp_path / f"b.txt.{suffix.upper()}").write_bytes(COMPRESS[suffix](b"drei\r\n"))
    assert list(iter_documents(tmp_path)) == [
        Document(f"a.jsonl.{suffix}:1", "one"),
        Document(f"a.jsonl.{suffix}:3", "two"),
        Document(f"b.txt.{suffix.upper()}", "drei\n"),
    ]


@pytest.mark.parametrize("suffix", list(COMPRESS))
@pytest.mark.parametrize("harm", ["cut", "altered", "foreign"])
def test_damaged_compression_is_named(tmp_path: Path, suffix: str, harm: str) -> None:
    content = bytearray(COMPRESS[suffix](LINES * 50))
    if harm == "cut":
        del content[-9:]
    elif harm == "altered":
        content[len(content) // 2] ^= 0xFF
    else:
        content = bytearray(b"no such thing as compression here")
    (tmp_path / f"a.jsonl.{suffix}").write_bytes(content)
    with pytest.raises(MorError, match=rf"a\.jsonl\.{suffix}"):
        list(iter_documents(tmp_path))


def test_several_frames_in_one_file(tmp_path: Path) -> None:
    for suffix, compress in COMPRESS.items():
        path = tmp_path / f"a.jsonl.{suffix}"
        path.write_bytes(compress(LINES) + compress(LINES))
        assert [d.text for d in iter_documents(path)] == ["one", "two"] * 2


def test_parquet(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", ["x", "", "z"])
    assert list(iter_documents(tmp_path)) == [
        Document("a.parquet:1", "x"),
        Document("a.parquet:2", ""),
        Document("a.parquet:3", "z"),
    ]
    with pytest.raises(MorError, match=r"has no column 'body'; its columns: 'id', 'text'"):
        list(iter_documents(tmp_path, text_field="body"))
    content = (tmp_path / "a.parquet").read_bytes()
    (tmp_path / "a.parquet").write_bytes(content[:-5])
    with pytest.raises(MorError, match=r"a\.parquet is not a whole Parquet file: .*fetch it again"):
        list(iter_documents(tmp_path))


def test_parquet_column_that_is_no_text(tmp_path: Path) -> None:
    parquet.write_table(pyarrow.table({"text": [1, 2]}), tmp_path / "a.parquet")
    with pytest.raises(MorError, match=r"a\.parquet:1: field 'text' is int, expected a string"):
        list(iter_documents(tmp_path))


@pytest.fixture(scope="module")
def mixed_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mixed")
    (folder / "a.jsonl").write_text('\ufeff{"text": "1"}\n\u00a0\n{"text": "2"}\n{"text": "3"}\n')
    (folder / "b.jsonl.zst").write_bytes(zstd.compress(LINES * 3))
    write_parquet(folder / "c.parquet", [*texts(11)])
    (folder / "d.txt").write_text("a text")
    return folder


@pytest.mark.parametrize("kind", ["files", "hub"])
def test_reading_goes_on_from_any_position(kind: str, mixed_folder: Path, dataset: Path) -> None:
    source: Source = FileSource(mixed_folder) if kind == "files" else HubSource(str(dataset))
    everything = list(source.read())
    assert len(everything) == (21 if kind == "files" else 30)
    for taken in range(len(everything) + 1):
        reading = source.read()
        stream = iter(reading)
        assert [next(stream) for _ in range(taken)] == everything[:taken]
        position = json.loads(json.dumps(reading.position()))
        assert list(source.read(position)) == everything[taken:]


def test_a_source_is_told_by_its_files(mixed_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("one")
    before = FileSource(tmp_path).identity()
    assert before != FileSource(mixed_folder).identity()
    (tmp_path / "x.txt").write_text("longer")
    assert before != FileSource(tmp_path).identity()
