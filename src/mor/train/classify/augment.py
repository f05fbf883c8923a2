"""Small changes of training examples that leave their class alone."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from mor.train.recipe.media import AugmentSection


def augment(
    item: dict[str, Tensor], section: AugmentSection, draw: torch.Generator
) -> dict[str, Tensor]:
    """An example with the changes that ``section`` asks for, drawn from ``draw``.

    Args:
        item: ``pixel_values`` [C, H, W] or ``input_features`` [frames, bins], and ``labels``.
        section: how much of what.
        draw: random numbers, all of which follow from the sample's number.
    """
    changed = dict(item)
    if "pixel_values" in item:
        changed["pixel_values"] = _change_pixels(item["pixel_values"], section, draw)
    else:
        changed["input_features"] = _change_frames(item["input_features"], section, draw)
    return changed


def _whole(high: int, draw: torch.Generator) -> int:
    """One of 0..high."""
    return int(torch.randint(high + 1, (), generator=draw))


def _change_pixels(pixels: Tensor, section: AugmentSection, draw: torch.Generator) -> Tensor:
    if section.shift:
        reach = section.shift
        height, width = pixels.shape[1:]
        down, along = _whole(2 * reach, draw), _whole(2 * reach, draw)
        # The border goes on: a value of its own would be an edge that no picture has.
        wide = F.pad(pixels[None], (reach,) * 4, mode="replicate")[0]
        pixels = wide[:, down : down + height, along : along + width]
    if section.flip and _whole(1, draw):
        pixels = pixels.flip(-1)
    if section.rotate or section.zoom:
        pixels = _turn(pixels, section, draw)
    return _add_noise(pixels, section, draw)


def _turn(pixels: Tensor, section: AugmentSection, draw: torch.Generator) -> Tensor:
    """Turn and stretch about the middle, in between pixels; the border goes on, as for a shift."""
    turn, tall, wide = (2 * torch.rand(3, generator=draw) - 1).tolist()
    angle = math.radians(section.rotate * turn)
    tall, wide = 1 + section.zoom * tall, 1 + section.zoom * wide
    # From a place in the result to one in the source, both from -1 to 1 along a side.
    ratio = pixels.shape[1] / pixels.shape[2]
    back = torch.tensor(
        [[math.cos(angle) / wide, ratio * math.sin(angle) / wide, 0.0],
         [-math.sin(angle) / (ratio * tall), math.cos(angle) / tall, 0.0]]
    )  # fmt: skip
    grid = F.affine_grid(back[None], [1, *pixels.shape], align_corners=False)
    return F.grid_sample(pixels[None], grid, padding_mode="border", align_corners=False)[0]


def _change_frames(frames: Tensor, section: AugmentSection, draw: torch.Generator) -> Tensor:
    length = len(frames)
    if section.shift:
        begin = _whole(min(section.shift, length - 1), draw)
        end = length - _whole(min(section.shift, length - 1 - begin), draw)
        frames = frames[begin:end]
    if section.mask:
        # SpecAugment's two masks (arXiv 1904.08779), each at most this share of its side.
        frames = frames.clone()
        for side in (0, 1):
            size = _whole(int(section.mask * frames.shape[side]), draw)
            begin = _whole(frames.shape[side] - size, draw)
            frames.narrow(side, begin, size).zero_()
    return _add_noise(frames, section, draw)


def _add_noise(values: Tensor, section: AugmentSection, draw: torch.Generator) -> Tensor:
    if not section.noise:
        return values.contiguous()
    return values + section.noise * torch.randn(values.shape, generator=draw)
