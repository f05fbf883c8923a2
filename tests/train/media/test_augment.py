"""Pictures that are turned and stretched: about the middle, by the angles and shares asked for."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from mor.train.classify.augment import augment
from mor.train.recipe.media import AugmentSection

LABEL = torch.tensor(0)


def change(pixels: torch.Tensor, seed: int, **fields: float) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    given = {"pixel_values": pixels, "labels": LABEL}
    return augment(given, AugmentSection(**fields), draw)["pixel_values"]


def middle(pixels: torch.Tensor) -> tuple[float, float]:
    """Where the light is, from the middle of the picture: down and along, in pixels."""
    height, width = pixels.shape[1:]
    down = (torch.arange(height) - (height - 1) / 2)[:, None]
    along = torch.arange(width) - (width - 1) / 2
    light = pixels[0] / pixels.sum()
    return float((light * down).sum()), float((light * along).sum())


def spot(height: int, width: int, down: int, along: int) -> torch.Tensor:
    """A dark picture with a bright square of 3 x 3 pixels."""
    pixels = torch.zeros(1, height, width)
    pixels[:, down - 1 : down + 2, along - 1 : along + 2] = 1.0
    return pixels


@given(st.integers(0, 9999), st.sampled_from([(24, 24), (20, 32), (31, 17)]))
def test_turning_keeps_the_distance_from_the_middle(seed: int, size: tuple[int, int]) -> None:
    height, width = size
    pixels = spot(height, width, height // 2 + 4, width // 2 + 2)
    before = middle(pixels)
    turned = change(pixels, seed, rotate=180)
    assert math.hypot(*middle(turned)) == pytest.approx(math.hypot(*before), abs=0.15)
    assert float(turned.sum()) == pytest.approx(9, rel=0.25)


@given(st.integers(0, 9999))
def test_a_small_turn_is_small_and_goes_both_ways(seed: int) -> None:
    pixels = spot(24, 24, 12, 20)
    down, along = middle(change(pixels, seed, rotate=10))
    assert abs(math.degrees(math.atan2(down, along) - math.atan2(*middle(pixels)))) < 11


@given(st.integers(0, 9999))
def test_zoom_moves_light_along_each_side_by_its_share(seed: int) -> None:
    pixels = spot(24, 32, 17, 24)
    ratios = [a / b for a, b in zip(middle(change(pixels, seed, zoom=0.2)), middle(pixels),
                                    strict=True)]  # fmt: skip
    assert all(0.78 < ratio < 1.22 for ratio in ratios)


def test_both_directions_are_drawn_and_one_seed_gives_one_picture() -> None:
    pixels = spot(24, 24, 12, 20)
    turns = [middle(change(pixels, seed, rotate=20))[0] for seed in range(20)]
    assert min(turns) < -1
    assert max(turns) > 1
    zooms = [middle(change(pixels, seed, zoom=0.3))[1] for seed in range(20)]
    assert min(zooms) < 8 < max(zooms)
    assert_close(change(pixels, 3, rotate=20, zoom=0.1), change(pixels, 3, rotate=20, zoom=0.1))


def test_a_plain_picture_stays_plain() -> None:
    """The border goes on: nothing dark comes in from outside."""
    assert_close(change(torch.ones(3, 9, 12), 1, rotate=45, zoom=0.5), torch.ones(3, 9, 12))
