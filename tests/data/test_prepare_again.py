"""Preparing again: reused, refused, replaced, or finished after a failure."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from mor.data import (
    TRAIN,
    VALIDATION,
    DataIndex,
    prepare,
    writer,
)
from mor.errors import MorError
from tests.data.preparing import SMALL, Writer, contents

# ------------------------------------------------------------------------- the output folder


def test_same_preparation_is_reused(corpus: Path, copy: Path) -> None:
    before = contents(copy)
    times = {path: path.stat().st_mtime_ns for path in copy.rglob("*")}
    index = prepare(corpus, copy, **SMALL)
    assert index.reused
    assert contents(copy) == before
    assert times == {path: path.stat().st_mtime_ns for path in copy.rglob("*")}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 7}, r"seed is 0 there, 7 was asked for"),
        ({"vocab_size": 301}, r"vocab_size is 300 there, 301 was asked for"),
        ({"shard_tokens": 9}, r"shard_tokens is 300 there, 9 was asked for"),
        ({"validation_fraction": 0.5}, r"validation_fraction is 0\.25 there, 0\.5 was asked"),
    ],
)
def test_another_preparation_is_refused(
    corpus: Path, copy: Path, change: dict[str, Any], message: str
) -> None:
    before = contents(copy)
    with pytest.raises(MorError, match=rf"already holds another preparation \({message}"):
        prepare(corpus, copy, **(SMALL | change))
    assert contents(copy) == before


def test_another_text_is_refused_and_overwritten_on_request(
    write_corpus: Writer, copy: Path, tmp_path: Path
) -> None:
    source = write_corpus(tmp_path / "source", 5)
    with pytest.raises(MorError, match=r"already holds another preparation \(source_sha256 is"):
        prepare(source, copy, **SMALL)
    index = prepare(source, copy, **SMALL, overwrite=True)
    assert not index.reused
    assert index == DataIndex.load(copy)
    assert index.num_documents(TRAIN) + index.num_documents(VALIDATION) == 5
    assert sorted(os.listdir(tmp_path)) == ["copy", "source"]


def test_damaged_shard_is_named_not_reused(corpus: Path, copy: Path) -> None:
    file = copy / "train-00001.bin"
    content = bytearray(file.read_bytes())
    content[70] ^= 1
    file.write_bytes(content)
    with pytest.raises(MorError, match=r"train-00001\.bin is damaged: its SHA-256"):
        prepare(corpus, copy, **SMALL)
    assert not prepare(corpus, copy, **SMALL, overwrite=True).reused
    assert prepare(corpus, copy, **SMALL).reused


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_with_other_things_stays_untouched(
    corpus: Path, copy: Path, overwrite: bool
) -> None:
    (copy / "thesis.tex").write_text("years of work")
    before = contents(copy)
    with pytest.raises(MorError, match=r"holds other things \(thesis\.tex\); choose a new folder"):
        prepare(corpus, copy, **SMALL, overwrite=overwrite)
    assert contents(copy) == before


def test_empty_folder_is_filled(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    prepare(corpus, tmp_path / "out", **SMALL)
    assert (tmp_path / "out" / "index.json").is_file()


def test_missing_parents_are_made(corpus: Path, tmp_path: Path) -> None:
    prepare(corpus, tmp_path / "a" / "b" / "out", **SMALL)
    assert os.listdir(tmp_path / "a" / "b") == ["out"]


def test_output_that_is_a_file(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    with pytest.raises(MorError, match=r"out is a file, expected a folder"):
        prepare(corpus, tmp_path / "out", **SMALL, overwrite=True)
    assert (tmp_path / "out").read_text() == "mine"


def test_output_below_a_file(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(MorError, match=r"cannot write .*file/out: "):
        prepare(corpus, tmp_path / "file" / "out", **SMALL)


@pytest.mark.parametrize("failure", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_failure_half_way_keeps_what_is_finished(
    corpus: Path, copy: Path, monkeypatch: pytest.MonkeyPatch, failure: BaseException
) -> None:
    """Disk full, Ctrl-C: nothing under the name, and the same command goes on."""
    whole = writer.ShardWriter.append

    def append(self: writer.ShardWriter, *args: Any) -> None:
        if self.num_tokens > 0 and "00001" in self.path.name:
            raise failure
        whole(self, *args)

    before = contents(copy)
    expected = MorError if isinstance(failure, OSError) else KeyboardInterrupt
    outs = (copy, copy.parent / "new")
    for out in outs:
        with monkeypatch.context() as patch:
            patch.setattr(writer.ShardWriter, "append", append)
            with pytest.raises(expected) as caught:
                prepare(corpus, out, **SMALL, seed=3, overwrite=True)
        if isinstance(failure, OSError):
            message = f"cannot write {out}: No space left on device; 1 finished segments are kept"
            assert str(caught.value).startswith(message)
    assert contents(copy) == before
    assert sorted(os.listdir(copy.parent)) == [".copy.partial", ".new.partial", "copy"]
    kept = {path.name for path in (copy.parent / ".new.partial" / "folder").iterdir()}
    assert kept == {"tokenizer", "train-00000.bin"}
    again: list[str] = []

    def note(self: writer.ShardWriter, name: str, *args: Any) -> None:
        whole(self, name, *args)
        again.append(name)

    monkeypatch.setattr(writer.ShardWriter, "append", note)
    prepare(corpus, copy, **SMALL, seed=3, overwrite=True)
    assert 0 < len(again) < 12  # what is finished is not done again
    prepare(corpus, copy.parent / "new", **SMALL, seed=3)
    assert contents(copy) == contents(copy.parent / "new")
    prepare(corpus, copy.parent / "fresh", **SMALL, seed=3)
    assert contents(copy) == contents(copy.parent / "fresh")
    assert sorted(os.listdir(copy.parent)) == ["copy", "fresh", "new"]


def test_failure_before_the_first_shard_leaves_no_trace(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def append(self: writer.ShardWriter, *args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writer.ShardWriter, "append", append)
    with pytest.raises(MorError, match=r"cannot write .*out: No space left on device$"):
        prepare(corpus, tmp_path / "out", **SMALL)
    assert os.listdir(tmp_path) == []


def test_an_unfinished_preparation_of_something_else(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = writer.ShardWriter.append

    def append(self: writer.ShardWriter, *args: Any) -> None:
        if "00001" in self.path.name:
            raise KeyboardInterrupt
        whole(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(writer.ShardWriter, "append", append)
        with pytest.raises(KeyboardInterrupt):
            prepare(corpus, tmp_path / "out", **SMALL)
    with pytest.raises(MorError, match=r"begun otherwise \(seed is 0 there, 5 was asked for\)"):
        prepare(corpus, tmp_path / "out", **SMALL, seed=5)
    shard = tmp_path / ".out.partial" / "folder" / "train-00000.bin"
    shard.rename(tmp_path / "moved")
    with pytest.raises(MorError, match=r"train-00000\.bin is missing, though .* counts it as"):
        prepare(corpus, tmp_path / "out", **SMALL)
    (tmp_path / "moved").rename(shard)
    index = prepare(corpus, tmp_path / "out", **SMALL, seed=5, overwrite=True)
    assert index.preparation["seed"] == 5
    assert os.listdir(tmp_path) == ["out"]


def test_two_at_once(corpus: Path, tmp_path: Path) -> None:
    def meanwhile(stage: str, done: int, total: int | None) -> None:
        if stage == "encoding":
            with pytest.raises(MorError, match=r"another process is preparing .*out"):
                prepare(corpus, tmp_path / "out", **SMALL)

    prepare(corpus, tmp_path / "out", **SMALL, progress=meanwhile)
    assert os.listdir(tmp_path) == ["out"]


def test_text_that_changes_meanwhile(write_corpus: Writer, tmp_path: Path) -> None:
    source = write_corpus(tmp_path / "source")

    def change(stage: str, done: int, total: int | None) -> None:
        if stage == "training the tokenizer":
            (source / "11.txt").write_text("something new")

    with pytest.raises(MorError, match=r"11\.txt changed while .* was being prepared"):
        prepare(source, tmp_path / "out", **SMALL, progress=change)
    assert os.listdir(tmp_path) == ["source"]


def test_file_that_goes_missing_meanwhile(write_corpus: Writer, tmp_path: Path) -> None:
    source = write_corpus(tmp_path / "source")

    def remove(stage: str, done: int, total: int | None) -> None:
        if stage == "training the tokenizer" and done == total:
            (source / "00.txt").unlink(missing_ok=True)

    with pytest.raises(MorError, match=r"files went missing while .* was being prepared"):
        prepare(source, tmp_path / "out", **SMALL, progress=remove)
    assert os.listdir(tmp_path) == ["source"]
