"""The examples of a prepared split, as a model takes them, and batches of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.data import Dataset

from mor.data.media.index import IMAGES, MediaIndex, MediaSplit
from mor.errors import MorError

PIXELS, FRAMES, MASK, LABELS = "pixel_values", "input_features", "attention_mask", "labels"


class MediaDataset(Dataset[dict[str, Tensor]]):
    """The images or sounds of one split.

    An item of images is `{"pixel_values": float32 [C, H, W], "labels": int64 []}`, of sounds
    `{"input_features": float32 [frames, coefficients], "labels": int64 []}`. Values have had the
    training split's mean taken off and are divided by its deviation, per channel or coefficient.

    Attributes:
        index: of the folder.
        split: its name.
        labels: int64 [n].
    """

    def __init__(self, folder: str | Path, split: str = "train") -> None:
        """Open a split.

        Raises:
            MorError: no such folder or split, or its file is missing, damaged, or not the one that
                the index says.
        """
        self.index, self.split = MediaIndex.load(folder), split
        self._info = self.index.split(split)
        tensors = _read(self.index, self._info)
        self.labels = tensors[LABELS]
        self._images = tensors.get("images")
        self._frames = tensors.get("frames")
        shape = (1,) if self.index.mean is None else (-1,)
        self._mean = torch.tensor(self.index.mean or (0.0,), dtype=torch.float32).view(shape)
        self._std = torch.tensor(self.index.std or (1.0,), dtype=torch.float32).view(shape)
        lengths = tensors.get("lengths")
        self._ends = None if lengths is None else lengths.cumsum(0)

    def __len__(self) -> int:
        """Examples of the split."""
        return len(self.labels)

    def raw(self, place: int) -> Tensor:
        """An example as it was stored: uint8 [H, W, C] or float32 [frames, coefficients]."""
        if self._images is not None:
            return self._images[place]
        assert self._frames is not None
        assert self._ends is not None
        begin = int(self._ends[place - 1]) if place else 0
        return self._frames[begin : int(self._ends[place])]

    def __getitem__(self, place: int) -> dict[str, Tensor]:
        """The example at `place`, from 0. Raises `IndexError` beyond the end."""
        if not -len(self) <= place < len(self):
            raise IndexError(f"example {place} of {len(self)}")
        place %= len(self)
        raw = self.raw(place)
        if self._images is not None:
            values = (raw.to(torch.float32) / 255 - self._mean) / self._std
            return {PIXELS: values.permute(2, 0, 1).contiguous(), LABELS: self.labels[place]}
        return {FRAMES: (raw - self._mean) / self._std, LABELS: self.labels[place]}


def collate_media(items: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """A batch: images stacked; sounds padded at their ends with zeros, and a mask beside them.

    Returns:
        `pixel_values` [B, C, H, W], or `input_features` [B, longest, coefficients] with
        `attention_mask` int64 [B, longest], 1 at real frames; and `labels` int64 [B].
    """
    labels = torch.stack([item[LABELS] for item in items])
    if PIXELS in items[0]:
        return {PIXELS: torch.stack([item[PIXELS] for item in items]), LABELS: labels}
    frames = [item[FRAMES] for item in items]
    lengths = torch.tensor([len(one) for one in frames])
    mask = torch.arange(int(lengths.max()))[None, :] < lengths[:, None]
    padded = torch.nn.utils.rnn.pad_sequence(frames, batch_first=True)
    return {FRAMES: padded, MASK: mask.to(torch.int64), LABELS: labels}


def _read(index: MediaIndex, split: MediaSplit) -> dict[str, Tensor]:
    """The tensors of a split, each with the type and shape that the index promises."""
    path = index.directory / split.file
    if not path.is_file():
        raise MorError(f"{path} is missing; prepare the data again")
    try:
        tensors: dict[str, Tensor] = load_file(path)
    except (SafetensorError, OSError) as error:
        raise MorError(f"{path} is damaged: {error}; prepare the data again") from error
    n = split.examples
    expected: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {LABELS: (torch.int64, (n,))}
    if index.kind == IMAGES:
        expected["images"] = (torch.uint8, (n, *index.shape))
    else:
        expected["frames"] = (torch.float32, (split.frames or 0, *index.shape))
        expected["lengths"] = (torch.int64, (n,))
    for name, (dtype, shape) in expected.items():
        found = tensors.get(name)
        if found is None or found.dtype != dtype or tuple(found.shape) != shape:
            what = "is missing" if found is None else f"is {found.dtype} {list(found.shape)}"
            raise MorError(f"{path}: {name} {what}, expected {dtype} {list(shape)}")
    if n and not 0 <= int(tensors[LABELS].min()) <= int(tensors[LABELS].max()) < len(index.classes):
        raise MorError(f"{path}: labels go beyond the {len(index.classes)} classes of the index")
    if "lengths" in tensors and int(tensors["lengths"].sum()) != split.frames:
        raise MorError(f"{path}: lengths do not add up to the {split.frames} frames there are")
    return tensors
