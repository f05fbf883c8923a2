"""A prepared folder of images or sounds: written, read back, batched, damaged."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from mor.data import DataIndex
from mor.data.media import MediaDataset, MediaIndex, collate_media
from mor.data.media.index import is_media
from mor.data.media.writer import Examples, Gathered, write_media
from mor.errors import MorError


def gather(kind: str, sizes: dict[str, int]) -> Gathered:
    """Random examples of two classes; sounds of one frame to nine."""
    made, splits = np.random.default_rng(0), {}
    for name, size in sizes.items():
        splits[name] = Examples()
        for place in range(size):
            image = made.integers(0, 256, (4, 6, 3), dtype=np.uint8)
            sound = made.normal(5.0, 2.0, (place % 9 + 1, 5)).astype(np.float32)
            splits[name].add(image if kind == "images" else sound, place % 2)
    return Gathered(kind, ("no", "yes"), splits, licence="none")


def write(kind: str, folder: Path) -> Gathered:
    gathered = gather(kind, {"train": 20, "validation": 0, "test": 5})
    write_media(gathered, folder, source="made", preparation={"seed": 0}, program="test")
    return gathered


@pytest.mark.parametrize("kind", ["images", "audio"])
def test_a_folder_gives_back_what_was_written(kind: str, tmp_path: Path) -> None:
    gathered = write(kind, tmp_path / "data")
    index = MediaIndex.load(tmp_path / "data")
    index.verify()
    assert is_media(tmp_path / "data")
    assert list(index.splits) == ["train", "test"]  # an empty split is none
    assert index.classes == ("no", "yes")
    for name in index.splits:
        dataset, examples = MediaDataset(tmp_path / "data", name), gathered.splits[name]
        assert len(dataset) == len(examples.values) == index.split(name).examples
        assert dataset.labels.tolist() == examples.labels
        for place, value in enumerate(examples.values):
            assert np.array_equal(dataset.raw(place).numpy(), value)
        assert torch.equal(
            next(iter(dataset[-1].values())), next(iter(dataset[len(dataset) - 1].values()))
        )
        with pytest.raises(IndexError):
            dataset[len(dataset)]


def test_images_are_normalised_by_the_training_split(tmp_path: Path) -> None:
    write("images", tmp_path / "data")
    items = list(MediaDataset(tmp_path / "data", "train"))
    batch = collate_media(items)
    assert batch["pixel_values"].shape == (20, 3, 4, 6)
    assert batch["pixel_values"].dtype == torch.float32
    values = batch["pixel_values"].transpose(0, 1).flatten(1)
    torch.testing.assert_close(values.mean(1), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(values.std(1, correction=0), torch.ones(3), atol=1e-5, rtol=0)


def test_sounds_are_padded_at_their_ends(tmp_path: Path) -> None:
    gathered = write("audio", tmp_path / "data")
    dataset = MediaDataset(tmp_path / "data", "train")
    batch = collate_media([dataset[3], dataset[8], dataset[0]])
    assert batch["input_features"].shape == (3, 9, 5)
    assert batch["attention_mask"].sum(1).tolist() == [4, 9, 1]
    assert batch["attention_mask"].dtype == batch["labels"].dtype == torch.int64
    assert batch["labels"].tolist() == [1, 0, 0]
    assert not batch["input_features"][batch["attention_mask"] == 0].any()
    mean, std = torch.tensor(dataset.index.mean), torch.tensor(dataset.index.std)
    expected = (torch.from_numpy(gathered.splits["train"].values[3]) - mean) / std
    torch.testing.assert_close(batch["input_features"][0, :4], expected)


def test_damage_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    write("images", folder)
    path = folder / "test.safetensors"
    whole, index = path.read_bytes(), (folder / "index.json").read_text("utf-8")
    path.write_bytes(whole[:-3])
    with pytest.raises(MorError, match=r"test\.safetensors is damaged"):
        MediaDataset(folder, "test")
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(MorError, match=r"test\.safetensors is damaged"):
        MediaIndex.load(folder).verify()
    path.write_bytes((folder / "train.safetensors").read_bytes())
    with pytest.raises(MorError, match="labels is"):
        MediaDataset(folder, "test")
    path.unlink()
    with pytest.raises(MorError, match="is missing"):
        MediaDataset(folder, "test")
    with pytest.raises(MorError, match="no split 'validation'; its splits: train, test"):
        MediaDataset(folder, "validation")
    for wrong, message in [
        (index.replace('"version": 1', '"version": 2'), "version 1"),
        (index.replace('"kind": "images"', '"kind": "smells"'), "damaged"),
        (index.replace('"splits"', '"parts"'), "damaged"),
        ("{", "not a prepared folder of images or sounds"),
    ]:
        (folder / "index.json").write_text(wrong, "utf-8")
        with pytest.raises(MorError, match=message):
            MediaIndex.load(folder)


def test_a_folder_of_text_and_one_of_images_are_told_apart(tmp_path: Path) -> None:
    write("images", tmp_path / "data")
    with pytest.raises(MorError, match="holds images"):
        DataIndex.load(tmp_path / "data")
    text = tmp_path / "text"
    text.mkdir()
    (text / "index.json").write_text(json.dumps({"format": "mor-data"}), "utf-8")
    assert not is_media(text)
    with pytest.raises(MorError, match="not a prepared folder of images or sounds"):
        MediaDataset(text)


def test_images_of_several_shapes_are_refused(tmp_path: Path) -> None:
    gathered = gather("images", {"train": 2})
    gathered.splits["train"].add(np.zeros((4, 4, 3), np.uint8), 0)
    with pytest.raises(MorError, match="one shape"):
        write_media(gathered, tmp_path / "data", source="made", preparation={}, program="test")
    assert not (tmp_path / "data").exists()
