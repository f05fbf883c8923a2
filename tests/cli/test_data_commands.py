"""`mor data` as a user runs it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from mor.data import DataIndex, ShardWriter
from tests.cli.done import Mor
from tests.tiny import write_corpus

# Data ------------------------------------------------------------------------------------------


def test_data(mor_: Mor, tmp_path: Path) -> None:
    source, out = write_corpus(tmp_path / "text"), tmp_path / "out"
    done = mor_("data", "prepare", source, "--out", out, "--vocab-size", 300)
    assert done.code == 0
    assert f"prepared: {out}" in done.out.replace("\n", "")
    assert (
        "already prepared" in mor_("data", "prepare", source, "--out", out, "--vocab-size", 300).out
    )
    info = mor_("data", "info", out)
    assert "train" in info.out
    assert "validation" in info.out
    assert mor_("data", "verify", out).out.splitlines() == [
        "ok train-00000.bin",
        "ok validation-00000.bin",
    ]
    shard = out / "train-00000.bin"
    content = bytearray(shard.read_bytes())
    content[70] ^= 1
    shard.write_bytes(content)
    assert "train-00000.bin is damaged" in mor_("data", "verify", out).error


def test_data_as_a_stream(mor_: Mor, data: Path, tmp_path: Path) -> None:
    """A dataset in the hub's form, a given tokenizer, a limit; damage of two shards named."""
    (tmp_path / "set").mkdir()
    texts = [f"Scene {n}. The king said to thee, my lord." for n in range(60)]
    parquet.write_table(pyarrow.table({"body": texts}), tmp_path / "set" / "train.parquet")
    out = tmp_path / "out"
    words = ["data", "prepare", f"hf:{tmp_path / 'set'}", "--out", out, "--text-field", "body"]
    words += ["--validation-fraction", 0.3, "--shard-tokens", 200]
    assert "--tokenizer DIR" in mor_(*words).error
    words += ["--tokenizer", data / "tokenizer", "--max-documents", 40]
    assert mor_(*words).code == 0
    index = DataIndex.load(out)
    assert index.num_documents("train") + index.num_documents("validation") == 40
    assert "already prepared" in mor_(*words).out
    for name in ("train-00000.bin", "validation-00000.bin"):
        content = bytearray((out / name).read_bytes())
        content[70] ^= 1
        (out / name).write_bytes(content)
    error = mor_("data", "verify", out).error
    assert error.count("is damaged: its SHA-256 is") == 2
    assert "train-00000.bin" in error
    assert "validation-00000.bin" in error
    assert "or prepare the data again (it was made by: mor data prepare hf:" in error


def test_preparing_interrupted(mor_: Mor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, out = write_corpus(tmp_path / "text"), tmp_path / "out"
    words = ["data", "prepare", source, "--out", out, "--vocab-size", 300, "--shard-tokens", 99]
    whole = ShardWriter.append

    def append(self: ShardWriter, *args: Any) -> None:
        if "00002" in self.path.name:
            raise KeyboardInterrupt
        whole(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(ShardWriter, "append", append)
        done = mor_(*words)
    assert done.code == 130
    assert "the same command goes on from there" in done.err
    assert not out.exists()
    assert mor_(*words).code == 0


@pytest.mark.parametrize("text", [None, ""])
def test_data_without_text(mor_: Mor, text: str | None, tmp_path: Path) -> None:
    source = tmp_path / "text.txt"
    if text is not None:
        source.write_text(text)
    out = tmp_path / "out"
    assert str(source) in mor_("data", "prepare", source, "--out", out).error
    assert not out.exists()
    assert [p for p in tmp_path.iterdir() if p != source] == []
