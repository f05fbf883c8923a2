"""The samples of a run: each once per epoch, the same on any number of ranks, from any place on."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.data_loader import prepare_data_loader
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from mor.data import (
    TRAIN,
    DataIndex,
    PackedDataset,
    ResumableSampler,
    ShardWriter,
    TrainingSamples,
    dataset,
    prepare,
    train_tokenizer,
)
from mor.data.index import VALIDATION
from mor.errors import MorError


def open_part(index: DataIndex, seed: int | None = 0, **options: Any) -> PackedDataset:
    return PackedDataset(index.directory, TRAIN, 16, order_seed=seed, **options)


@pytest.fixture(scope="module")
def other(prepared: DataIndex, tmp_path_factory: pytest.TempPathFactory) -> DataIndex:
    """A smaller folder with the same tokenizer."""
    source = tmp_path_factory.mktemp("other")
    for number in range(4):
        (source / f"{number}.txt").write_text(f"Another text {number} of the night. " * 12)
    return prepare(
        *(source, source / "out"), tokenizer=prepared.tokenizer_dir, validation_fraction=0.3
    )


@given(per_step=st.integers(1, 12), epochs=st.integers(1, 3))
def test_epochs_of_one_dataset(prepared: DataIndex, per_step: int, epochs: int) -> None:
    part = open_part(prepared)
    stream = TrainingSamples([part], per_step=per_step)
    assert stream.epoch_length == len(part) // per_step * per_step
    taken = stream.take(epochs * stream.epoch_length)
    found = [taken.locate(n)[1] for n in range(len(taken))]
    for epoch in range(epochs):
        rows = found[epoch * stream.epoch_length : (epoch + 1) * stream.epoch_length]
        assert len(set(rows)) == len(rows)
        assert rows == [part.chunk(i, epoch) for i in range(stream.epoch_length)]
    assert taken.epoch_at(len(taken)) == epochs


def test_a_mixture_goes_through_each_dataset_by_itself(
    prepared: DataIndex, other: DataIndex
) -> None:
    parts = [open_part(prepared, 0), open_part(other, 1)]
    stream = TrainingSamples(parts, [3, 1], seed=0).take(400)
    located = [stream.locate(n) for n in range(400)]
    for part, share in zip(parts, (0.75, 0.25), strict=True):
        rows = [row for found, row in located if found is part]
        for n in range(1, 401):
            count = sum(found is part for found, _ in located[:n])
            assert abs(count - share * n) < 1
        epochs = [rows[i : i + len(part)] for i in range(0, len(rows), len(part))]
        for number, epoch in enumerate(epochs):
            assert epoch == [part.chunk(i, number) for i in range(len(epoch))]
            assert len(set(epoch)) == len(epoch)
    fresh = stream.num_fresh
    assert len({(id(p), row) for p, row in located[:fresh]}) == fresh
    assert located[fresh] in located[:fresh]
    assert stream.epoch_length == len(parts[0]) + len(parts[1])
    for n in (0, 17, 399):
        part, row = located[n]
        want = dataset.read_rows([(part, row)])["input_ids"][0]
        assert torch.equal(stream[n]["input_ids"], want)


def loader_of(
    stream: TrainingSamples, start: int, world: int, rank: int, batch: int = 2, workers: int = 0
) -> Any:
    """The loader as Trainer and Accelerate build it, of one rank."""
    sampler = ResumableSampler(stream, lambda: start)
    loader = DataLoader(stream, batch_size=batch, sampler=sampler, num_workers=workers)
    return prepare_data_loader(loader, num_processes=world, process_index=rank, put_on_device=False)


def ids_of(loader: Any) -> list[list[list[int]]]:
    return [batch["input_ids"].tolist() for batch in loader]


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("mixed", [False, True])
def test_ranks_share_an_epoch(
    prepared: DataIndex, other: DataIndex, world: int, mixed: bool
) -> None:
    batch, accumulation = 2, 3
    per_step = batch * accumulation * world
    parts = [open_part(prepared), open_part(other)] if mixed else [open_part(prepared)]
    stream = TrainingSamples(parts, [2, 1] if mixed else None, per_step=per_step)
    stream = stream.take(stream.epoch_length // per_step * per_step)
    assert len(stream) >= per_step
    ranks = [ids_of(loader_of(stream, 0, world, rank)) for rank in range(world)]
    assert len({len(found) for found in ranks}) == 1
    seen = Counter(str(row) for found in ranks for rows in found for row in rows)
    assert seen == Counter(str(stream[n]["input_ids"].tolist()) for n in range(len(stream)))
    # Whatever the number of ranks, an optimiser step sees the same samples.
    for step in range(len(stream) // per_step):
        mine = [
            row
            for found in ranks
            for rows in found[step * accumulation : (step + 1) * accumulation]
            for row in rows
        ]
        first = step * per_step
        want = [stream[n]["input_ids"].tolist() for n in range(first, first + per_step)]
        assert sorted(mine) == sorted(want)
    # From the middle on, each rank goes on with exactly what it would have had.
    middle = len(stream) // per_step // 2
    for rank in range(world):
        rest = ids_of(loader_of(stream, middle * per_step, world, rank))
        assert rest == ranks[rank][middle * accumulation :]


def test_nothing_before_the_start_is_read(
    prepared: DataIndex, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[int] = []
    whole = PackedDataset.fill

    def fill(self: PackedDataset, row: int, ids: np.ndarray) -> Any:
        read.append(row)
        return whole(self, row, ids)

    monkeypatch.setattr(PackedDataset, "fill", fill)
    stream = TrainingSamples([open_part(prepared)], per_step=4).take(10**6)
    start = 10**6 - 8
    assert len(ids_of(loader_of(stream, start, 1, 0, batch=4))) == 2
    assert read == [stream.locate(n)[1] for n in range(start, 10**6)]


@pytest.mark.parametrize("packing", ["concat", "best_fit"])
def test_worker_processes_give_the_same(prepared: DataIndex, packing: str) -> None:
    stream = TrainingSamples(
        [open_part(prepared, packing=packing, document_mask=True)], per_step=2
    ).take(30)
    alone = list(loader_of(stream, 4, 1, 0))
    for one, other_ in zip(alone, loader_of(stream, 4, 1, 0, workers=2), strict=True):
        assert one.keys() == other_.keys()
        assert all(torch.equal(one[name], other_[name]) for name in one)


def test_a_large_folder_resumes_at_once(tmp_path: Path, prepared: DataIndex) -> None:
    """At any place of any epoch; rows are counted by the million."""
    folder = tmp_path / "large"
    folder.mkdir()
    infos = {}
    for split, tokens in ((TRAIN, 4_000_000), (VALIDATION, 100)):
        with ShardWriter(folder / f"{split}-00000.bin", 300) as writer:
            writer.append("all", np.zeros(tokens, dtype=np.int64), tokens)
        assert writer.info is not None
        infos[split] = (writer.info,)
    DataIndex(folder, infos, 300, 0, "test", "", "", {}).save()
    for sample in (0, 10**6, 10**9 + 1, 10**12):
        began = time.monotonic()
        part = PackedDataset(folder, TRAIN, 2, order_seed=0)
        stream = TrainingSamples([part], per_step=8).take(10**13)
        next(iter(loader_of(stream, sample, 1, 0)))
        assert time.monotonic() - began < 1.0


# Mistakes --------------------------------------------------------------------------------------


def test_too_little_for_one_step(prepared: DataIndex) -> None:
    with pytest.raises(MorError, match=r"fewer than the 999 of one optimiser step; lower"):
        TrainingSamples([open_part(prepared)], per_step=999)


def test_weights_are_needed(prepared: DataIndex, other: DataIndex) -> None:
    for weights in (None, [1.0]):
        with pytest.raises(MorError, match=r"weights are .*, expected 2, one per folder"):
            TrainingSamples([open_part(prepared), open_part(other)], weights)


def test_layouts_must_agree(prepared: DataIndex, other: DataIndex) -> None:
    with pytest.raises(MorError, match=r"datasets of one mixture differ in layout"):
        TrainingSamples([open_part(prepared), open_part(other, packing="best_fit")], [1, 1])


def test_tokenizers_must_agree(
    prepared: DataIndex, write_corpus: Callable[..., Path], tmp_path: Path
) -> None:
    corpus = write_corpus(tmp_path / "corpus")
    strange = prepare(corpus, tmp_path / "strange", vocab_size=280, validation_fraction=0.3)
    with pytest.raises(MorError, match=r"strange was prepared with another tokenizer than .*--to"):
        TrainingSamples([open_part(prepared), open_part(strange)], [1, 1])
    # As large, but not the same.
    train_tokenizer(["zzz yyy xxx qqq"] * 9, 300).save_pretrained(tmp_path / "t")
    other_words = [path.read_text()[::-1] for path in sorted(corpus.iterdir())]
    train_tokenizer(other_words, prepared.vocab_size).save_pretrained(tmp_path / "t")
    twin = prepare(corpus, tmp_path / "twin", tokenizer=tmp_path / "t", validation_fraction=0.3)
    assert twin.vocab_size == prepared.vocab_size
    with pytest.raises(MorError, match=r"twin was prepared with another tokenizer than"):
        TrainingSamples([open_part(prepared), open_part(twin)], [1, 1])


def test_past_the_end(prepared: DataIndex) -> None:
    stream = TrainingSamples([open_part(prepared)]).take(5)
    with pytest.raises(IndexError, match="sample 5 of 5"):
        stream[5]
