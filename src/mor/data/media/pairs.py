"""Pictures that need more than a class: one or two images side by side, and what is said of them.

Each sample is a question (or none) and its answer: the whole caption, or what is on one side.
Sample n is a function of n, the seed and the data alone.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import Dataset

from mor.data.media.dataset import MediaDataset
from mor.data.media.index import IMAGES
from mor.errors import MorError

SIDES = ("left", "right")
DIGITS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
NOTHING = "nothing"


@dataclass(frozen=True)
class Pair:
    """A picture and words.

    Attributes:
        pixels: uint8 [H, 2 W, C].
        question: empty where a caption is wanted.
        answer: what is right.
    """

    pixels: Tensor
    question: str
    answer: str


class CaptionedPairs(Dataset[Pair]):
    """Samples of a split of images: a left and a right half, one of which may be empty.

    Args:
        images: a split of a prepared folder of images.
        samples: how many there are.
        names: what each class is called; default :func:`class_names`.
        seed: of the draw.
        questions: whether some samples ask for one side alone.

    Raises:
        MorError: the folder holds sounds, or not as many names as classes.
    """

    def __init__(
        self,
        images: MediaDataset,
        samples: int,
        *,
        names: Sequence[str] | None = None,
        seed: int = 0,
        questions: bool = True,
    ) -> None:
        if images.index.kind != IMAGES:
            raise MorError(f"{images.index.directory} holds {images.index.kind}, not images")
        self.names = list(class_names(images.index.classes) if names is None else names)
        if len(self.names) != len(images.index.classes):
            raise MorError(
                f"names has {len(self.names)} entries for {len(images.index.classes)} classes"
            )
        self.images, self.samples, self.seed, self.questions = images, samples, seed, questions

    def __len__(self) -> int:
        """Samples."""
        return self.samples

    def __getitem__(self, number: int) -> Pair:
        """Sample ``number``, from 0. Raises ``IndexError`` beyond the end."""
        if not 0 <= number < self.samples:
            raise IndexError(f"sample {number} of {self.samples}")
        draw = random.Random(self.seed * 1_000_003 + number)
        places = [draw.randrange(len(self.images)) for _ in SIDES]
        halves = [self.images.raw(place) for place in places]
        shown: dict[str, str | None] = {
            side: self.names[int(self.images.labels[place])]
            for side, place in zip(SIDES, places, strict=True)
        }
        if draw.random() < 0.3:  # one alone
            empty = draw.randrange(2)
            halves[empty] = torch.zeros_like(halves[empty])
            shown[SIDES[empty]] = None
        pixels = torch.cat(halves, 1)
        if self.questions and draw.random() < 0.5:
            side = draw.choice(SIDES)
            return Pair(pixels, ask(side), shown[side] or NOTHING)
        return Pair(pixels, "", caption(shown))


def ask(side: str) -> str:
    """The question for one side."""
    return f"what is on the {side}?"


def caption(shown: Mapping[str, str | None]) -> str:
    """What is said of a picture, by what is on each side.

    ``a picture of the digit seven on the left``, or ``... to the left of the digit three``.
    """
    left, right = (shown[side] for side in SIDES)
    if left and right:
        return f"a picture of {left} to the left of {right}"
    return f"a picture of {left} on the left" if left else f"a picture of {right} on the right"


def class_names(classes: Sequence[str]) -> list[str]:
    """What classes are called in a sentence: ``the digit seven`` for 7, ``a cat`` for cat."""
    if all(name.isdigit() and int(name) < len(DIGITS) for name in classes):
        return [f"the digit {DIGITS[int(name)]}" for name in classes]
    return [f"{'an' if name[:1].lower() in 'aeiou' else 'a'} {name}" for name in classes]
