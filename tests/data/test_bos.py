"""What documents and prompts begin with: one policy, kept with the data."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from mor import MoRConfig
from mor.data import (
    Bos,
    DataIndex,
    PackedDataset,
    TrainingSamples,
    prepare,
    prompt_tokens,
    resolve_bos,
)
from mor.data.bos import apply_bos, check_same_bos, model_bos, own_frame, text_start
from mor.data.tokenizer import DocumentEncoder
from mor.errors import MorError
from mor.eval.folds import text_sequences
from tests.bos import BOS, EOS, KINDS, TEXTS, bos_tokenizer, save_bos_tokenizer

USED = ("template", "llama", "framed")  # begin their texts with BOS by themselves


def make(tmp_path: Path, kind: str, mode: Any, name: str = "out", **how: Any) -> DataIndex:
    source = tmp_path / "in"
    if not source.is_dir():
        source.mkdir()
        for number in range(8):
            (source / f"{number}.txt").write_text(f"{number}: {TEXTS[number % 3]}")
    tokenizer = save_bos_tokenizer(kind, tmp_path / kind)
    return prepare(
        source, tmp_path / name, tokenizer=tokenizer, bos=mode, validation_fraction=0.3, **how
    )


def documents(index: DataIndex) -> list[list[int]]:
    return [
        shard.document(number).tolist()
        for split in index.splits
        for shard in index.open_shards(split)
        for number in range(shard.num_documents)
    ]


@pytest.mark.parametrize("mode", ["auto", "always", "never"])
@pytest.mark.parametrize("kind", ["plain", "unused", *USED])
def test_every_document_begins_as_it_was_asked(tmp_path: Path, kind: str, mode: str) -> None:
    if kind == "plain" and mode == "always":
        with pytest.raises(MorError, match="bos=always needs a tokenizer with a bos_token"):
            make(tmp_path, kind, mode)
        return
    added = mode == "always" or (mode == "auto" and kind in USED)
    index = make(tmp_path, kind, mode)
    start = [BOS] if added else []
    plain = bos_tokenizer(kind)
    found = documents(index)
    assert sorted(map(tuple, found)) == sorted(
        (*start, *plain(f"{n}: {TEXTS[n % 3]}", add_special_tokens=False).input_ids, EOS)
        for n in range(8)
    )
    assert index.bos == Bos(None if kind == "plain" else BOS, added)
    assert DataIndex.load(index.directory).bos == index.bos == index.known_bos()
    # The tokenizer that is saved does the same by itself: a text is a document without its end.
    saved = AutoTokenizer.from_pretrained(index.tokenizer_dir)
    for ids in found:
        text = saved.decode(ids, skip_special_tokens=True)
        assert saved(text).input_ids == ids[:-1]
    assert make(tmp_path, kind, mode).reused


def test_a_tokenizer_with_two_tokens_before_a_text(tmp_path: Path) -> None:
    with pytest.raises(MorError, match=r"begins a text with 2 tokens \[1, 0\]"):
        make(tmp_path, "twofold", "auto")
    assert make(tmp_path, "twofold", "always").bos == Bos(BOS, True)
    with pytest.raises(MorError, match=r"bos='sometimes' is not known; use one of: auto, always"):
        make(tmp_path, "plain", "sometimes", "other")


def test_a_trained_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in TEXTS))
    how: dict[str, Any] = {"vocab_size": 300, "validation_fraction": 0.4}
    today = prepare(tmp_path / "a.jsonl", tmp_path / "auto", **how)
    assert today.bos == Bos(0, False)
    assert all(ids[0] != 0 and ids[-1] == 0 for ids in documents(today))
    twice = prepare(tmp_path / "a.jsonl", tmp_path / "always", bos="always", **how)
    assert sorted(documents(twice)) == sorted([0, *ids] for ids in documents(today))
    given = twice.tokenizer_dir  # it has learnt to begin texts so
    again = prepare(
        tmp_path / "a.jsonl", tmp_path / "again", tokenizer=given, validation_fraction=0.4
    )
    assert sorted(documents(again)) == sorted(documents(twice))


def test_another_process_begins_documents_alike() -> None:
    for ended in (True, False):
        encode = DocumentEncoder(bos_tokenizer("template"), (BOS,), ended=ended)
        sent = pickle.loads(pickle.dumps(encode))
        assert [ids.tolist() for ids in sent(TEXTS)] == [ids.tolist() for ids in encode(TEXTS)]
        assert all(ids[0] == BOS and (ids[-1] == EOS) == ended for ids in sent(TEXTS))


def test_the_policy_decides_what_a_preparation_is(tmp_path: Path) -> None:
    make(tmp_path, "template", "auto")
    assert make(tmp_path, "template", "always").reused  # the same in other words
    with pytest.raises(MorError, match=r"another preparation \(document_bos is 1 there, None"):
        make(tmp_path, "template", "never")


def made_before(index: DataIndex) -> Path:
    """The folder as an earlier program wrote it, which knew no BOS."""
    path = index.directory / "index.json"
    content = json.loads(path.read_text())
    for name in ("bos_token_id", "add_bos_token", "skipped"):
        del content[name]
    del content["preparation"]["document_bos"]
    path.write_text(json.dumps(content))
    bos_tokenizer("template").save_pretrained(index.tokenizer_dir)  # as it was given
    return index.directory


def test_folders_from_before_have_no_bos(tmp_path: Path) -> None:
    folder = made_before(make(tmp_path, "template", "never", "old"))
    old = DataIndex.load(folder)
    assert (old.bos, old.known_bos()) == (Bos(None, None), Bos(BOS, False))
    assert old.skipped == {}
    assert len(PackedDataset(folder, "train", 8)) > 0
    assert make(tmp_path, "template", "never", "old").reused
    with pytest.raises(MorError, match=r"document_bos is None there, 1 was asked for"):
        make(tmp_path, "template", "auto", "old")
    same = make(tmp_path, "template", "never", "new")
    same.check_same_tokenizer(old)
    other = make(tmp_path, "template", "auto", "bos")
    with pytest.raises(
        MorError, match=r"without BOS.*with BOS \(id 1\); prepare one of them again"
    ):
        old.check_same_tokenizer(other)
    parts = [PackedDataset(i.directory, "train", 8) for i in (old, other)]
    with pytest.raises(MorError, match=r"with BOS \(id 1\).*without BOS"):
        TrainingSamples(parts, [1, 1])


@pytest.mark.parametrize(
    ("field", "value"),
    [("bos_token_id", "x"), ("add_bos_token", 1), ("skipped", {"null": "x"}), ("skipped", [])],
)
def test_a_damaged_policy_is_named(tmp_path: Path, field: str, value: Any) -> None:
    path = make(tmp_path, "template", "auto").directory / "index.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: value}))
    with pytest.raises(MorError, match=r"index\.json is damaged"):
        DataIndex.load(path.parent)


# Prompts -----------------------------------------------------------------------------------------


def config_of(bos: Bos) -> MoRConfig:
    return MoRConfig(
        vocab_size=300, bos_token_id=bos.token, add_bos_token=bos.added, eos_token_id=EOS
    )


@given(
    st.sampled_from(("plain", "unused", *USED)),
    st.sampled_from(("auto", "always", "never")),
    st.text(max_size=20),
)
def test_a_prompt_is_a_document_that_goes_on(kind: str, mode: str, text: str) -> None:
    tokenizer = bos_tokenizer(kind)
    if kind == "plain" and mode == "always":
        return
    bos = resolve_bos(tokenizer, mode)
    prompt = prompt_tokens(text, tokenizer, config_of(bos))
    document = next(DocumentEncoder(tokenizer, bos.start)([text])).tolist()
    assert document[-1] == EOS
    assert prompt == (document[:-1] or [EOS])  # nothing to begin with: what precedes documents
    told = apply_bos(tokenizer, bos)
    assert own_frame(told) == (bos.start, ())
    if text:
        assert told(text).input_ids == prompt


@pytest.mark.parametrize("kind", [*USED, "unused"])
def test_a_bos_that_is_written_already_is_not_doubled(kind: str) -> None:
    tokenizer = bos_tokenizer(kind)
    config = config_of(resolve_bos(tokenizer, "always"))
    once = prompt_tokens("the king", tokenizer, config)
    assert once[0] == BOS
    assert once.count(BOS) == 1
    assert prompt_tokens("<s>the king", tokenizer, config) == once


def test_models_that_say_nothing_do_as_their_tokenizer() -> None:
    for kind in KINDS:
        tokenizer = bos_tokenizer(kind)
        silent = MoRConfig(vocab_size=300, bos_token_id=BOS, eos_token_id=EOS)
        start, _ = own_frame(tokenizer)
        assert text_start(tokenizer, silent) == start == text_start(tokenizer)
    # Ours from before named the end of text, and had read texts without BOS.
    ours = MoRConfig(vocab_size=300, bos_token_id=EOS, eos_token_id=EOS)
    tokenizer = bos_tokenizer("template")
    assert model_bos(ours, tokenizer) == Bos(BOS, False)
    assert BOS not in prompt_tokens("the king", tokenizer, ours)
    assert prompt_tokens("", tokenizer, ours) == [EOS]


def test_half_a_surrogate_is_refused() -> None:
    with pytest.raises(MorError, match="the prompt is not valid Unicode"):
        prompt_tokens("a \ud800", bos_tokenizer("template"), config_of(Bos(BOS, True)))


def test_a_text_file_is_one_document(tmp_path: Path) -> None:
    path = tmp_path / "held-out.txt"
    path.write_text("the king said </s> to the queen " * 20)
    for kind in (*USED, "unused"):
        tokenizer = bos_tokenizer(kind)
        for mode in ("auto", "never"):
            bos = resolve_bos(tokenizer, mode)
            rows = text_sequences(path, tokenizer, 16, None, config_of(bos))
            ids = [i for row in rows for i in row["input_ids"].tolist()]
            document = next(DocumentEncoder(tokenizer, bos.start)([path.read_text()])).tolist()
            assert ids == document[: len(ids)]
            assert ids.count(BOS) == len(bos.start)
            assert EOS not in ids  # spelled out in the text, it ends nothing
        assert text_sequences(path, tokenizer, 16, None)[0]["input_ids"][0] == (
            BOS if kind in USED else ids[0]
        )


def test_policies_that_differ() -> None:
    always, never, unknown = Bos(BOS, True), Bos(BOS, False), Bos(None, None)
    check_same_bos(always, always, "the model", "data")
    check_same_bos(unknown, always, "the model", "data")
    check_same_bos(never, unknown, "the model", "data")
    for model, data, mode in ((always, never, "always"), (never, always, "never")):
        with pytest.raises(MorError, match=f"data was prepared .*again with --bos {mode}"):
            check_same_bos(model, data, "the model", "data")
    with pytest.raises(MorError, match=r"without BOS .before that was recorded"):
        check_same_bos(always, unknown, "the model", "data")
    with pytest.raises(MorError, match=r"with BOS \(id 3\)"):
        check_same_bos(always, Bos(3, True), "the model", "data")


@pytest.mark.parametrize(
    "fields", [{"add_bos_token": "yes"}, {"add_bos_token": True}, {"add_bos_token": 1}]
)
def test_a_configuration_must_make_sense(fields: dict[str, Any]) -> None:
    with pytest.raises(MorError, match="add_bos_token="):
        MoRConfig(**fields)
    with pytest.raises(MorError, match="bos_token_id=400 must lie in"):
        MoRConfig(vocab_size=300, bos_token_id=400, add_bos_token=True)


def test_the_policy_survives_saving(tmp_path: Path) -> None:
    for added in (True, False, None):
        config = config_of(Bos(BOS, added))
        config.save_pretrained(tmp_path)
        again: Callable[..., MoRConfig] = MoRConfig.from_pretrained
        loaded = again(tmp_path)
        assert (loaded.bos_token_id, loaded.add_bos_token) == (BOS, added)
