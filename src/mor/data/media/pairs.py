"""Examples that need more than a class: two of a folder together, and what is said of them.

Images stand side by side, one of which may be missing; sounds follow each other, or there is one
alone. Each sample is a question (or none) and its answer: the whole caption, or what is at one of
the two places. Sample n is a function of n, the seed and the data alone.
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

DIGITS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
NOTHING = "nothing"


@dataclass(frozen=True)
class Wording:
    """How two examples are told of.

    Attributes:
        places: what each is asked for by.
        question: for one place.
        both: the caption of two.
        alone: the caption where there is only the one at a place, by place; None where that cannot
            be.
    """

    places: tuple[str, str]
    question: str
    both: str
    alone: tuple[str, str | None]

    def ask(self, place: str) -> str:
        """The question for one place."""
        return self.question.format(place)

    def caption(self, shown: Mapping[str, str | None]) -> str:
        """What is said of both, by what is at each place."""
        first, second = (shown[place] for place in self.places)
        if first and second:
            return self.both.format(first, second)
        told = self.alone[0] if first else self.alone[1]
        assert told is not None
        return told.format(first or second)


PICTURES = Wording(
    ("left", "right"),
    "what is on the {}?",
    "a picture of {} to the left of {}",
    ("a picture of {} on the left", "a picture of {} on the right"),
)
RECORDINGS = Wording(
    ("first", "second"),
    "what is heard {}?",
    "a recording of {} and then {}",
    ("a recording of {} alone", None),
)


def wording_of(kind: str) -> Wording:
    """How pairs of a folder of this kind are told of."""
    return PICTURES if kind == IMAGES else RECORDINGS


@dataclass(frozen=True)
class Pair:
    """A picture or a recording, and words.

    Attributes:
        media: uint8 [H, 2 W, C], or float32 [frames, coefficients].
        question: empty where a caption is wanted.
        answer: what is right.
    """

    media: Tensor
    question: str
    answer: str


class CaptionedPairs(Dataset[Pair]):
    """Samples of a split: two examples together, one of which may be missing.

    Args:
        examples: a split of a prepared folder.
        samples: how many there are.
        names: what each class is called; default :func:`class_names`.
        seed: of the draw.
        questions: whether some samples ask for one place alone.

    Attributes:
        wording: how they are told of.

    Raises:
        MorError: not as many names as classes.
    """

    def __init__(
        self,
        examples: MediaDataset,
        samples: int,
        *,
        names: Sequence[str] | None = None,
        seed: int = 0,
        questions: bool = True,
    ) -> None:
        self.names = list(class_names(examples.index.classes) if names is None else names)
        if len(self.names) != len(examples.index.classes):
            raise MorError(
                f"names has {len(self.names)} entries for {len(examples.index.classes)} classes"
            )
        self.examples, self.samples, self.seed = examples, samples, seed
        self.questions, self.wording = questions, wording_of(examples.index.kind)

    def __len__(self) -> int:
        """Samples."""
        return self.samples

    def __getitem__(self, number: int) -> Pair:
        """Sample ``number``, from 0. Raises ``IndexError`` beyond the end."""
        if not 0 <= number < self.samples:
            raise IndexError(f"sample {number} of {self.samples}")
        draw, wording = random.Random(self.seed * 1_000_003 + number), self.wording
        drawn = [draw.randrange(len(self.examples)) for _ in wording.places]
        parts = [self.examples.raw(number) for number in drawn]
        shown: dict[str, str | None] = {
            place: self.names[int(self.examples.labels[number])]
            for place, number in zip(wording.places, drawn, strict=True)
        }
        if draw.random() < 0.3:  # one alone
            if wording is PICTURES:  # half of it is empty
                missing = draw.randrange(2)
                parts[missing] = torch.zeros_like(parts[missing])
            else:
                missing = 1
                del parts[missing]
            shown[wording.places[missing]] = None
        media = torch.cat(parts, 1 if wording is PICTURES else 0)
        if self.questions and draw.random() < 0.5:
            place = draw.choice(wording.places)
            return Pair(media, wording.ask(place), shown[place] or NOTHING)
        return Pair(media, "", wording.caption(shown))


def class_names(classes: Sequence[str]) -> list[str]:
    """What classes are called in a sentence: ``the digit seven`` for 7, ``a cat`` for cat."""
    if all(name.isdigit() and int(name) < len(DIGITS) for name in classes):
        return [f"the digit {DIGITS[int(name)]}" for name in classes]
    if set(classes) <= set(DIGITS):
        return [f"the digit {name}" for name in classes]
    return [f"{'an' if name[:1].lower() in 'aeiou' else 'a'} {name}" for name in classes]
