"""Packed chunks: nothing lost, nothing twice, the same order for the same seed."""

from __future__ import annotations

import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.data_loader import DataLoaderShard, skip_first_batches
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerFast

from mor.data import TRAIN, VALIDATION, DataIndex, PackedDataset, prepare
from mor.errors import MorError


def stream(index: DataIndex, split: str) -> torch.Tensor:
    """All tokens of a split in reading order."""
    shards = [shard.tokens.astype(np.int64) for shard in index.open_shards(split)]
    return torch.from_numpy(np.concatenate(shards))


@given(seq_len=st.integers(2, 200), split=st.sampled_from([TRAIN, VALIDATION]))
def test_chunks_are_the_text_in_order(prepared: DataIndex, seq_len: int, split: str) -> None:
    text = stream(prepared, split)
    dataset = PackedDataset(prepared.directory, split, seq_len)
    assert len(dataset) == len(text) // seq_len
    chunks = [dataset[i] for i in range(len(dataset))]
    for chunk in chunks:
        assert chunk.keys() == {"input_ids", "labels"}
        assert chunk["input_ids"].shape == (seq_len,)
        assert chunk["input_ids"].dtype == chunk["labels"].dtype == torch.int64
        assert torch.equal(chunk["input_ids"], chunk["labels"])
    joined = torch.cat([chunk["input_ids"] for chunk in chunks])
    assert torch.equal(joined, text[: len(joined)])


def test_chunks_cross_shards(prepared: DataIndex) -> None:
    first, second = prepared.open_shards(TRAIN)[:2]
    seq_len = first.num_tokens - 30
    want = [*first.tokens[seq_len // 2 * 2 :], *second.tokens]
    half = PackedDataset(prepared.directory, TRAIN, seq_len // 2)
    assert half[2]["input_ids"].tolist() == want[: seq_len // 2]
    assert first.num_tokens < 3 * (seq_len // 2)


def test_labels_can_be_masked_without_touching_the_input(prepared: DataIndex) -> None:
    chunk = PackedDataset(prepared.directory, TRAIN, 16)[0]
    before = chunk["input_ids"].clone()
    chunk["labels"][:] = -100
    assert torch.equal(chunk["input_ids"], before)


@given(seed=st.integers(0, 2**32), epoch=st.integers(0, 1000))
def test_a_seeded_epoch_holds_every_chunk_once(prepared: DataIndex, seed: int, epoch: int) -> None:
    dataset = PackedDataset(prepared.directory, TRAIN, 16, order_seed=seed)
    order = [dataset.chunk(i, epoch) for i in range(len(dataset))]
    assert sorted(order) == list(range(len(dataset)))
    # A fresh dataset that starts in the middle of that epoch goes on with the same chunks.
    resumed = PackedDataset(prepared.directory, TRAIN, 16, order_seed=seed)
    resumed.set_epoch(epoch)
    middle = len(dataset) // 2
    plain = PackedDataset(prepared.directory, TRAIN, 16)
    assert [resumed.chunk(i) for i in range(middle, len(dataset))] == order[middle:]
    assert torch.equal(resumed[middle]["input_ids"], plain[order[middle]]["input_ids"])


def test_seed_and_epoch_change_the_order(prepared: DataIndex) -> None:
    def order(seed: int | None, epoch: int) -> list[int]:
        dataset = PackedDataset(prepared.directory, TRAIN, 8, order_seed=seed)
        return [dataset.chunk(i, epoch) for i in range(len(dataset))]

    assert order(0, 0) == order(0, 0)
    assert order(0, 0) != order(1, 0)
    assert order(0, 0) != order(0, 1)
    assert order(None, 0) == order(None, 5) == sorted(order(0, 0))


def test_accelerate_resumes_in_the_middle_of_an_epoch(prepared: DataIndex) -> None:
    dataset = PackedDataset(prepared.directory, TRAIN, 8, order_seed=0)
    order = [dataset.chunk(i, 1) for i in range(len(dataset))]
    rest = skip_first_batches(DataLoaderShard(dataset, batch_size=1), 30)
    rest.set_epoch(1)  # as the Hugging Face trainer does
    text = stream(prepared, TRAIN)
    for chunk, batch in zip(order[30:], rest, strict=True):
        assert torch.equal(batch["input_ids"][0], text[8 * chunk : 8 * chunk + 8])


def test_index_past_the_end(prepared: DataIndex) -> None:
    dataset = PackedDataset(prepared.directory, TRAIN, 8, order_seed=0)
    with pytest.raises(IndexError, match=rf"chunk {len(dataset)} of {len(dataset)}"):
        dataset[len(dataset)]
    assert torch.equal(dataset[-1]["input_ids"], dataset[len(dataset) - 1]["input_ids"])


def test_pickled_dataset_reads_the_same(prepared: DataIndex) -> None:
    dataset = PackedDataset(prepared.directory, TRAIN, 16, order_seed=2)
    dataset.set_epoch(3)
    again = pickle.loads(pickle.dumps(dataset))
    assert torch.equal(again[1]["input_ids"], dataset[1]["input_ids"])


def test_data_loader_batches(prepared: DataIndex) -> None:
    dataset = PackedDataset(prepared.directory, TRAIN, 16)
    batch = next(iter(DataLoader(dataset, batch_size=3)))
    assert batch["input_ids"].shape == batch["labels"].shape == (3, 16)


def test_totals_and_documents(prepared: DataIndex) -> None:
    dataset = PackedDataset(prepared.directory, VALIDATION, 16)
    assert dataset.total_tokens == prepared.num_tokens(VALIDATION)
    assert dataset.num_documents == prepared.num_documents(VALIDATION)
    assert dataset.bytes_per_token == prepared.bytes_per_token(VALIDATION)
    documents = list(dataset.iter_documents())
    assert len(documents) == dataset.num_documents
    assert torch.equal(torch.cat([ids for _, ids in documents]), stream(prepared, VALIDATION))
    assert all(ids[-1] == prepared.eos_token_id for _, ids in documents)


@pytest.mark.parametrize("seq_len", [-1, 0, 1])
def test_seq_len_too_short(prepared: DataIndex, seq_len: int) -> None:
    with pytest.raises(MorError, match=rf"seq_len is {seq_len}, expected 2 or more"):
        PackedDataset(prepared.directory, TRAIN, seq_len)


def test_seq_len_longer_than_the_split(prepared: DataIndex) -> None:
    total = prepared.num_tokens(VALIDATION)
    assert len(PackedDataset(prepared.directory, VALIDATION, total)) == 1
    message = rf"seq_len is {total + 1}, but split 'validation' of .* has only {total} tokens"
    with pytest.raises(MorError, match=message):
        PackedDataset(prepared.directory, VALIDATION, total + 1)


def test_negative_order_seed(prepared: DataIndex) -> None:
    with pytest.raises(MorError, match=r"order_seed is -1, expected 0 or more"):
        PackedDataset(prepared.directory, TRAIN, 16, order_seed=-1)


def test_unknown_split(prepared: DataIndex) -> None:
    with pytest.raises(MorError, match=r"no split 'test'; its splits: train, validation"):
        PackedDataset(prepared.directory, "test", 16)


def test_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(MorError, match=r"data folder .*gone does not exist"):
        PackedDataset(tmp_path / "gone", TRAIN, 16)


def test_wrong_folder(tmp_path: Path) -> None:
    with pytest.raises(MorError, match=r"is not a prepared data folder: it has no index\.json"):
        PackedDataset(tmp_path, TRAIN, 16)


def test_token_id_out_of_range_names_the_shard(prepared: DataIndex, tmp_path: Path) -> None:
    folder = shutil.copytree(prepared.directory, tmp_path / "copy")
    file = folder / "train-00001.bin"
    content = bytearray(file.read_bytes())
    content[64 + 2 * 20 : 64 + 2 * 21] = (300).to_bytes(2, "little")
    file.write_bytes(content)
    dataset = PackedDataset(folder, TRAIN, 16)
    with pytest.raises(MorError, match=r"train-00001\.bin is damaged: token id 300 between tokens"):
        for _ in dataset:  # type: ignore[attr-defined]
            pass


def test_large_vocabulary_uses_wide_tokens(corpus: Path, tmp_path: Path) -> None:
    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {f"<filler {number}>": number for number in range(65_536)}
    vocab |= {symbol: 65_536 + number for number, symbol in enumerate(symbols)}
    letters = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    letters.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    letters.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=letters, eos_token="<filler 0>")
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    index = prepare(corpus, tmp_path / "out", tokenizer=tmp_path / "tokenizer")
    assert index.vocab_size == 65_536 + 256
    assert index.open_shards(TRAIN)[0].tokens.dtype == np.uint32
    name, ids = next(PackedDataset(tmp_path / "out", TRAIN, 16).iter_documents())
    assert tokenizer.decode(ids[:-1]) == (corpus / name).read_text()
