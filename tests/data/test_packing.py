"""Best-fit packing, document masks: every token once, no document cut that fits, labels right."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mor.data import TRAIN, DataIndex, PackedDataset, ShardWriter, TokenShard
from mor.data.packing import best_fit, load_plan, make_plan
from mor.errors import MorError

LENGTHS = st.lists(st.integers(1, 40), max_size=60)


def slow_best_fit(lengths: list[int], size: int) -> list[int]:
    """Best fit decreasing as one would write it on paper: the room left in each bin."""
    room: list[int] = []
    for length in sorted(lengths, reverse=True):
        fits = [i for i, left in enumerate(room) if left >= length]
        if fits:
            room[min(fits, key=lambda i: room[i])] -= length
        else:
            room.append(size - length)
    return sorted(room)


@given(lengths=LENGTHS, extra=st.integers(0, 30))
def test_best_fit_decreasing_is_that(lengths: list[int], extra: int) -> None:
    size = max(lengths, default=1) + extra
    bins = best_fit(np.array(lengths, dtype=np.int64), size)
    used = np.bincount(bins, weights=lengths).astype(int) if lengths else np.array([], int)
    assert (used <= size).all()
    assert sorted((size - used).tolist()) == slow_best_fit(lengths, size)


def shard_of(folder: Path, sizes: list[int]) -> tuple[TokenShard, Any]:
    with ShardWriter(folder / "train-00000.bin", 60_000) as writer:
        for number, size in enumerate(sizes):
            writer.append(f"document {number}", np.arange(size) + 100 * number, size)
    return TokenShard(folder / "train-00000.bin"), writer.info


@given(sizes=st.lists(st.integers(1, 70), min_size=1, max_size=40), seq_len=st.integers(2, 30))
def test_a_plan_holds_every_token_once(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int], seq_len: int
) -> None:
    shard, _ = shard_of(tmp_path_factory.mktemp("shard"), sizes)
    plan = make_plan(shard, seq_len)
    covered = np.concatenate(
        [np.arange(s, s + n) for s, n in zip(plan.starts, plan.lengths, strict=True)]
    )
    assert sorted(covered.tolist()) == list(range(shard.num_tokens))
    per_row = np.add.reduceat(plan.lengths, plan.rows[:-1])
    assert (per_row <= seq_len).all()
    # A piece is within one document, and documents that fit are whole.
    begins = shard.starts.astype(int)
    document = np.searchsorted(begins, plan.starts, side="right") - 1
    assert (plan.starts + plan.lengths <= begins[document + 1]).all()
    pieces = np.bincount(document)
    assert pieces.tolist() == [-(-size // seq_len) for size in sizes]
    heads = plan.starts[plan.rows[:-1]]
    assert (np.diff(heads) > 0).all()


@pytest.fixture
def folder(prepared: DataIndex, tmp_path: Path) -> Path:
    return shutil.copytree(prepared.directory, tmp_path / "copy")


def rows(dataset: PackedDataset) -> list[dict[str, list[int]]]:
    return [{name: v.tolist() for name, v in dataset[i].items()} for i in range(len(dataset))]


def documents(folder: Path) -> list[list[int]]:
    return [ids.tolist() for _, ids in PackedDataset(folder, TRAIN, 2).iter_documents()]


@pytest.mark.parametrize("seq_len", [5, 16, 67, 80, 200, 100_000])
@pytest.mark.parametrize("mask", [False, True])
def test_best_fit_rows(folder: Path, seq_len: int, mask: bool) -> None:
    dataset = PackedDataset(folder, TRAIN, seq_len, packing="best_fit", document_mask=mask)
    found = []
    for row in rows(dataset):
        assert set(row) == {"input_ids", "labels", "attention_mask"} | (
            {"document_ids", "position_ids"} if mask else set()
        )
        used = sum(row["attention_mask"])
        assert row["attention_mask"] == [1] * used + [0] * (seq_len - used)
        assert row["labels"][used:] == [-100] * (seq_len - used)
        if not mask:
            assert row["labels"][:used] == row["input_ids"][:used]
            found += row["input_ids"][:used]
            continue
        check_mask(row, used)
        pieces = np.split(row["input_ids"][:used], np.flatnonzero(np.diff(row["document_ids"])) + 1)
        found += [piece.tolist() for piece in pieces if len(piece)]
    if mask:
        want = [d[i : i + seq_len] for d in documents(folder) for i in range(0, len(d), seq_len)]
        assert sorted(found) == sorted(want)
    else:
        assert sorted(found) == sorted(token for d in documents(folder) for token in d)
    total = len(dataset) * seq_len
    assert dataset.padding_fraction == pytest.approx(1 - dataset.total_tokens / total)


def check_mask(row: dict[str, list[int]], used: int) -> None:
    """Documents count up from 0, positions restart, and no first token is a target."""
    document, position = row["document_ids"], row["position_ids"]
    assert document[0] == position[0] == 0
    for t in range(1, len(document)):
        begins = document[t] == document[t - 1] + 1
        assert begins or document[t] == document[t - 1]
        assert position[t] == (0 if begins else position[t - 1] + 1)
        assert t < used or not begins
    for t in range(used):
        assert row["labels"][t] == (-100 if position[t] == 0 else row["input_ids"][t])


@pytest.mark.parametrize("seq_len", [5, 16, 67, 200])
def test_concatenated_rows_with_documents(folder: Path, seq_len: int) -> None:
    plain = PackedDataset(folder, TRAIN, seq_len)
    masked = PackedDataset(folder, TRAIN, seq_len, document_mask=True)
    assert len(plain) == len(masked)
    eos = plain.index.eos_token_id
    for before, row in zip(rows(plain), rows(masked), strict=True):
        assert row["input_ids"] == before["input_ids"]
        assert set(row) == {"input_ids", "labels", "document_ids", "position_ids"}
        check_mask(row, seq_len)
        ends = [t for t, token in enumerate(row["input_ids"]) if token == eos]
        heads = [t for t in range(1, seq_len) if row["position_ids"][t] == 0]
        assert heads == [t + 1 for t in ends if t + 1 < seq_len]


def test_batches_are_the_same_rows(folder: Path) -> None:
    for packing in ("concat", "best_fit"):
        dataset = PackedDataset(
            folder, TRAIN, 32, packing=packing, document_mask=True, order_seed=1
        )
        for one, many in zip(rows(dataset), dataset.__getitems__(range(len(dataset))), strict=True):
            assert one == {name: value.tolist() for name, value in many.items()}


def test_plans_are_kept_and_follow_the_shard(folder: Path) -> None:
    dataset = PackedDataset(folder, TRAIN, 32, packing="best_fit")
    kept = sorted((folder / "packing").iterdir())
    assert [path.name for path in kept] == [
        f"{Path(shard.file).stem}-32.plan" for shard in dataset.index.shards(TRAIN)
    ]
    want = rows(dataset)
    times = [path.stat().st_mtime_ns for path in kept]
    assert rows(PackedDataset(folder, TRAIN, 32, packing="best_fit")) == want
    assert [path.stat().st_mtime_ns for path in kept] == times
    shutil.copy(kept[0], kept[1])  # another shard's
    kept[0].write_bytes(kept[0].read_bytes()[:-8])  # cut short
    assert rows(PackedDataset(folder, TRAIN, 32, packing="best_fit")) == want
    for path in kept:
        path.unlink()
    (folder / "packing").rmdir()
    (folder / "packing").write_text("in the way: as in a folder that is read only")
    assert rows(PackedDataset(folder, TRAIN, 32, packing="best_fit")) == want


def test_a_large_shard_is_packed_tightly_and_fast(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    sizes = np.minimum(draw.lognormal(6.3, 1.0, 20_000).astype(int) + 1, 50_000)
    with ShardWriter(tmp_path / "train-00000.bin", 10) as writer:
        for size in sizes:
            writer.append("", np.zeros(size, dtype=np.int64), 1)
    assert writer.info is not None
    plan = load_plan(TokenShard(tmp_path / "train-00000.bin"), writer.info, 2048)
    assert 1 - sizes.sum() / (plan.num_rows * 2048) < 0.001
    assert os.listdir(tmp_path / "packing") == ["train-00000-2048.plan"]


def test_damaged_boundaries_are_named(tmp_path: Path) -> None:
    shard, _ = shard_of(tmp_path, [4, 4, 4])
    content = bytearray(shard.path.read_bytes())
    at = 64 + 24 + 8
    content[at] = 11
    shard.path.write_bytes(content)
    with pytest.raises(MorError, match=r"train-00000\.bin is damaged: its document boundaries"):
        make_plan(TokenShard(shard.path), 8)


def test_unknown_packing(folder: Path) -> None:
    with pytest.raises(MorError, match=r"packing is 'tight', expected 'concat' or 'best_fit'"):
        PackedDataset(folder, TRAIN, 8, packing="tight")  # type: ignore[arg-type]
