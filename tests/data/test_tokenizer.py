"""Training and loading tokenizers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from mor.data import DataIndex, load_tokenizer, train_tokenizer
from mor.data.tokenizer import DocumentEncoder, tokenizer_digest, tokenizer_vocab_size
from mor.errors import MorError

TEXTS = ["to be or not to be, that is the question", "to die, to sleep, no more"] * 5


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return train_tokenizer(TEXTS, 270)


# Surrogates are no text: a document that holds one is refused when it is read.
any_text = st.text(st.characters(exclude_categories=["Cs"]))


@given(text=any_text)
def test_every_text_comes_back_exactly(tokenizer: Any, text: str) -> None:
    ids = tokenizer(text, split_special_tokens=True, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids) == text


@given(
    texts=st.lists(st.one_of(any_text, st.just("x<|endoftext|>y<|pad|>"), st.just("")), max_size=4)
)
def test_a_document_ends_once_whatever_it_says(tokenizer: Any, texts: list[str]) -> None:
    encoded = list(DocumentEncoder(tokenizer)(texts))
    assert len(encoded) == len(texts)
    for text, ids in zip(texts, encoded, strict=True):
        assert (ids == tokenizer.eos_token_id).nonzero()[0].tolist() == [len(ids) - 1]
        assert tokenizer.pad_token_id not in ids
        assert tokenizer.decode(ids[:-1]) == text


def test_the_encoder_ignores_truncation_and_padding_and_keeps_them(tokenizer: Any) -> None:
    other = train_tokenizer(TEXTS, 270)
    other.backend_tokenizer.enable_truncation(3)
    other.backend_tokenizer.enable_padding(length=9)
    want = [ids.tolist() for ids in DocumentEncoder(tokenizer)(TEXTS)]
    assert [ids.tolist() for ids in DocumentEncoder(other)(TEXTS)] == want
    assert other.backend_tokenizer.truncation["max_length"] == 3


def test_training_is_deterministic(tokenizer: Any) -> None:
    again = train_tokenizer(TEXTS, 270)
    assert again.backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()
    assert tokenizer_digest(again) == tokenizer_digest(tokenizer)
    assert tokenizer_digest(train_tokenizer(TEXTS, 260)) != tokenizer_digest(tokenizer)


def test_special_tokens_and_size(tokenizer: Any) -> None:
    assert tokenizer_vocab_size(tokenizer) == len(tokenizer) == 270
    assert tokenizer.eos_token == tokenizer.bos_token == "<|endoftext|>"
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (0, 1)
    assert tokenizer("to be")["input_ids"][0] != tokenizer.bos_token_id


def test_merges_are_learned(tokenizer: Any) -> None:
    assert len(tokenizer("to be")["input_ids"]) < 5


def test_text_without_pairs_gives_a_smaller_vocabulary() -> None:
    assert tokenizer_vocab_size(train_tokenizer(["a", "b"], 4096)) == 258


def test_saved_folder_loads_with_auto_tokenizer(tokenizer: Any, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path)
    text = "To be, or not… ünïcode 🙂\n"
    for loaded in (load_tokenizer(tmp_path), AutoTokenizer.from_pretrained(tmp_path)):
        assert loaded(text)["input_ids"] == tokenizer(text)["input_ids"]
        assert loaded.decode(loaded(text)["input_ids"]) == text
        assert (loaded.eos_token_id, loaded.pad_token_id, loaded.padding_side) == (0, 1, "left")


def test_vocabulary_too_small() -> None:
    with pytest.raises(MorError, match=r"vocab_size is 100, expected at least 258"):
        train_tokenizer(TEXTS, 100)


def test_missing_tokenizer_folder(tmp_path: Path) -> None:
    with pytest.raises(MorError, match=r"tokenizer folder .*gone does not exist"):
        load_tokenizer(tmp_path / "gone")


@pytest.mark.parametrize("content", [None, "{", '{"version": "1.0"}'])
def test_folder_without_a_tokenizer(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(MorError, match=r"is not a Hugging Face tokenizer folder") as caught:
        load_tokenizer(tmp_path)
    assert "\n" not in str(caught.value)


def test_tokenizer_without_end_of_text(prepared: DataIndex, tmp_path: Path) -> None:
    folder = tmp_path / "tokenizer"
    shutil.copytree(prepared.tokenizer_dir, folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    del config["eos_token"]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(MorError, match=r"has no eos_token"):
        load_tokenizer(folder)
