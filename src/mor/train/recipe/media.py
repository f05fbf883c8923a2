"""The part of a recipe's ``data`` section that images and sounds alone have."""

from __future__ import annotations

from mor.train.recipe.base import Section
from mor.train.recipe.fields import decides


class AugmentSection(Section):
    """Small changes of every training example, drawn anew each time it is seen."""

    shift: int = decides(
        "weights", 0, ge=0, description="pixels in each direction, or frames cut off each end"
    )
    flip: bool = decides("weights", False, description="images: left for right, half the time")
    rotate: float = decides(
        "weights", 0.0, ge=0, le=180, description="images: at most so many degrees either way"
    )
    zoom: float = decides(
        "weights",
        0.0,
        ge=0,
        lt=1,
        description="images: larger or smaller by at most this share, each side by itself",
    )
    noise: float = decides(
        "weights", 0.0, ge=0, description="deviation of normal noise on normalised values"
    )
    mask: float = decides(
        "weights",
        0.0,
        ge=0,
        lt=1,
        description="sounds: the largest share of frames, and of bins, that is set to the mean",
    )
