"""Preparing a folder: what is in it, when it is reused, and that it is whole or not there."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mor.data import (
    TRAIN,
    VALIDATION,
    DataIndex,
    console_progress,
    iter_documents,
    load_tokenizer,
    prepare,
    train_tokenizer,
)
from mor.errors import MorError
from tests.data.preparing import SMALL, Writer, contents


def names(index: DataIndex, split: str) -> list[str]:
    return [name for shard in index.open_shards(split) for name in shard.names]


def test_every_document_is_in_one_split_and_decodes(corpus: Path, prepared: DataIndex) -> None:
    texts = {document.name: document.text for document in iter_documents(corpus)}
    split_names = {split: names(prepared, split) for split in (TRAIN, VALIDATION)}
    assert sorted(split_names[TRAIN] + split_names[VALIDATION]) == sorted(texts)
    tokenizer = load_tokenizer(prepared.tokenizer_dir)
    for split in (TRAIN, VALIDATION):
        for shard in prepared.open_shards(split):
            for number, name in enumerate(shard.names):
                *ids, last = shard.document(number).tolist()
                assert tokenizer.decode(ids) == texts[name]
                assert last == tokenizer.eos_token_id == prepared.eos_token_id
                assert last not in ids


def test_counts(corpus: Path, prepared: DataIndex) -> None:
    sizes = {d.name: len(d.text.encode()) for d in iter_documents(corpus)}
    for split in (TRAIN, VALIDATION):
        shards = prepared.open_shards(split)
        assert prepared.num_tokens(split) == sum(len(shard.tokens) for shard in shards)
        assert prepared.num_documents(split) == len(names(prepared, split))
        assert prepared.num_bytes(split) == sum(sizes[name] for name in names(prepared, split))
        assert prepared.bytes_per_token(split) == (
            prepared.num_bytes(split) / prepared.num_tokens(split)
        )
    part = prepared.num_bytes(VALIDATION) / sum(sizes.values())
    assert part == pytest.approx(0.25, abs=0.05)


def test_full_shards_and_file_names(prepared: DataIndex) -> None:
    shards = prepared.shards(TRAIN)
    assert len(shards) > 1
    assert [shard.file for shard in shards] == [f"train-{i:05d}.bin" for i in range(len(shards))]
    assert all(shard.num_tokens >= 300 for shard in shards[:-1])
    assert sorted(os.listdir(prepared.directory)) == sorted(
        ["index.json", "tokenizer", *(s.file for split in prepared.splits.values() for s in split)]
    )


def test_tokenizer_never_sees_validation_text(corpus: Path, prepared: DataIndex) -> None:
    held_out = set(names(prepared, VALIDATION))
    texts = [d.text for d in iter_documents(corpus) if d.name not in held_out]
    trained = load_tokenizer(prepared.tokenizer_dir)
    assert trained.get_vocab() == train_tokenizer(texts, 300).get_vocab()
    texts = [d.text for d in iter_documents(corpus)]
    assert trained.get_vocab() != train_tokenizer(texts, 300).get_vocab()


def test_index_comes_back_from_disk(prepared: DataIndex) -> None:
    assert DataIndex.load(prepared.directory) == prepared
    assert list(prepared.verify()) == [s for split in prepared.splits.values() for s in split]


def test_same_input_gives_the_same_bytes(corpus: Path, prepared: DataIndex, tmp_path: Path) -> None:
    prepare(corpus, tmp_path / "again", **SMALL)
    assert contents(tmp_path / "again") == contents(prepared.directory)


def test_seed_decides_the_split(corpus: Path, prepared: DataIndex, tmp_path: Path) -> None:
    other = prepare(corpus, tmp_path / "other", **SMALL, seed=1)
    assert set(names(other, VALIDATION)) != set(names(prepared, VALIDATION))


def test_copies_and_empty_documents_are_left_out(write_corpus: Writer, tmp_path: Path) -> None:
    source = write_corpus(tmp_path / "source", 3)
    for number in range(20):
        shutil.copy(source / "01.txt", source / f"copy-{number}.txt")
    (source / "empty.txt").write_text("")
    (source / "blank.md").write_text(" \n\t\n")
    index = prepare(source, tmp_path / "out", **SMALL)
    assert (index.num_duplicates, index.num_empty) == (20, 2)
    assert sorted(names(index, TRAIN) + names(index, VALIDATION)) == [
        "00.txt",
        "01.txt",
        "02.txt",
    ]


def test_given_tokenizer_is_used_as_it_is(
    corpus: Path, prepared: DataIndex, tmp_path: Path
) -> None:
    train_tokenizer(["quite another text"] * 3, 280).save_pretrained(tmp_path / "tokenizer")
    index = prepare(
        corpus, tmp_path / "out", tokenizer=tmp_path / "tokenizer", validation_fraction=0.25
    )
    given = load_tokenizer(tmp_path / "tokenizer")
    assert index.vocab_size == len(given) < 280
    assert load_tokenizer(index.tokenizer_dir).get_vocab() == given.get_vocab()
    assert index.num_tokens(TRAIN) != prepared.num_tokens(TRAIN)
    assert prepare(
        corpus, tmp_path / "out", tokenizer=tmp_path / "tokenizer", validation_fraction=0.25
    ).reused
    with pytest.raises(MorError, match=r"tokenizer_sha256 is \w+ there, None was asked for"):
        prepare(corpus, tmp_path / "out", validation_fraction=0.25)


def test_progress_reaches_its_total(write_corpus: Writer, tmp_path: Path) -> None:
    told: list[tuple[str, int, int | None]] = []
    source = write_corpus(tmp_path / "source")
    index = prepare(source, tmp_path / "out", **SMALL, progress=lambda *report: told.append(report))
    everything = index.num_bytes(TRAIN) + index.num_bytes(VALIDATION)
    last = {stage: (done, total) for stage, done, total in told}
    assert last == {
        "reading": (everything, None),
        "training the tokenizer": (index.num_bytes(TRAIN), index.num_bytes(TRAIN)),
        "encoding": (everything, everything),
    }


def test_console_progress_draws_each_stage(capsys: pytest.CaptureFixture[str]) -> None:
    with console_progress() as progress:
        progress("reading", 10, None)
        progress("encoding", 5, 10)
        progress("encoding", 10, 10)
    shown = capsys.readouterr()
    assert "reading" in shown.err
    assert "encoding" in shown.err
    assert shown.out == ""


# ------------------------------------------------------------------------------- bad input


def test_empty_corpus(tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "a.txt").write_text("")
    (tmp_path / "source" / "b.jsonl").write_text('{"text": " "}\n')
    with pytest.raises(MorError, match=r"holds no text: 2 documents, all of them empty"):
        prepare(tmp_path / "source", tmp_path / "out")
    assert os.listdir(tmp_path) == ["source"]


def test_one_document(write_corpus: Writer, tmp_path: Path) -> None:
    source = write_corpus(tmp_path / "source", 1)
    with pytest.raises(MorError, match=r"needs at least 2 different documents with text, found 1"):
        prepare(source, tmp_path / "out")
    assert os.listdir(tmp_path) == ["source"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vocab_size": 10}, r"vocab_size is 10, expected at least 258"),
        ({"validation_fraction": 1.0}, r"validation_fraction is 1\.0, expected"),
        ({"shard_tokens": 0}, r"shard_tokens is 0, expected 1 or more"),
        ({"tokenizer": "no-such-folder"}, r"tokenizer folder no-such-folder does not exist"),
    ],
)
def test_bad_parameter(corpus: Path, tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(MorError, match=message):
        prepare(corpus, tmp_path / "out", **change)
    assert os.listdir(tmp_path) == []


# ----------------------------------------------------------------------------- the index


def change_index(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    content = json.loads((folder / "index.json").read_text())
    change(content)
    (folder / "index.json").write_text(json.dumps(content))


def test_moved_folder_still_loads(prepared: DataIndex, copy: Path) -> None:
    index = DataIndex.load(copy)
    assert index.directory == copy
    assert index.splits == prepared.splits


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(format="other"), r"is not the index of a prepared data folder"),
        (lambda c: c.update(version=9), r"has version 9, this program reads 1"),
        (lambda c: c.pop("splits"), r"is damaged: .*splits"),
        (lambda c: c.update(splits=[]), r"is damaged"),
        (lambda c: c.update(vocab_size="big"), r"is damaged: .*vocab_size is 'big'"),
        (lambda c: c["splits"]["train"]["shards"][0].pop("sha256"), r"is damaged: .*sha256"),
        (lambda c: c["splits"]["train"]["shards"][0].update(num_tokens=None), r"is damaged"),
        (lambda c: c["splits"]["train"]["shards"][0].update(file="../x"), r"outside the folder"),
    ],
)
def test_damaged_index_is_named(
    copy: Path, change: Callable[[dict[str, Any]], Any], message: str
) -> None:
    change_index(copy, change)
    with pytest.raises(MorError, match=rf"index\.json.*{message}"):
        DataIndex.load(copy)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff", b"[]"])
def test_index_that_is_no_json(copy: Path, content: bytes) -> None:
    (copy / "index.json").write_bytes(content)
    with pytest.raises(MorError, match=r"index\.json is (damaged|not the index)"):
        DataIndex.load(copy)


def test_shards_of_another_preparation(copy: Path) -> None:
    shutil.copy(copy / "train-00000.bin", copy / "validation-00000.bin")
    with pytest.raises(MorError, match=r"validation-00000\.bin is not the one in index\.json"):
        DataIndex.load(copy).open_shards(VALIDATION)


def test_shards_of_another_vocabulary(copy: Path) -> None:
    change_index(copy, lambda content: content.update(vocab_size=299))
    with pytest.raises(MorError, match=r"for a vocabulary of 300, index\.json says 299"):
        DataIndex.load(copy).open_shards(TRAIN)


def test_missing_shard_is_named(copy: Path) -> None:
    (copy / "train-00000.bin").unlink()
    with pytest.raises(MorError, match=r"cannot read shard .*train-00000\.bin"):
        list(DataIndex.load(copy).verify())
