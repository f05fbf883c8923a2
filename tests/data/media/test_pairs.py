"""Pairs of images and what is said of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from mor.data.media import MediaDataset
from mor.data.media.index import IMAGES, SOUNDS
from mor.data.media.pairs import NOTHING, PICTURES, RECORDINGS, CaptionedPairs, class_names
from mor.data.media.writer import Examples, Gathered, write_media
from mor.errors import MorError


def folder(path: Path, kind: str = IMAGES) -> MediaDataset:
    """Three images per class, all pixels of which are 50 and the class."""
    examples = Examples()
    for label in (0, 1, 2) * 3:
        shape = (2, 3, 1) if kind == IMAGES else (2, 3)
        examples.add(np.full(shape, 50 + label, np.uint8 if kind == IMAGES else np.float32), label)
    gathered = Gathered(kind, ["0", "1", "2"], {"train": examples})
    write_media(gathered, path, source="x", preparation={}, program="mor")
    return MediaDataset(path, "train")


def test_words_say_what_is_in_the_picture(tmp_path: Path) -> None:
    names = ["the digit zero", "the digit one", "the digit two"]
    pairs = CaptionedPairs(folder(tmp_path / "d"), 200, seed=5)
    assert pairs.names == names
    seen = set()
    for number in range(len(pairs)):
        one = pairs[number]
        assert one.media.shape == (2, 6, 1)
        value = {"left": int(one.media[0, 0]), "right": int(one.media[0, 3])}
        shown = {side: names[v - 50] if v else None for side, v in value.items()}
        assert any(shown.values())
        if not one.question:
            assert one.answer == PICTURES.caption(shown)
        else:
            side = one.question.removeprefix("what is on the ").removesuffix("?")
            assert one.answer == (shown[side] or NOTHING)
        seen.add((one.question, tuple(value.values())))
        again = pairs[number]
        assert torch.equal(again.media, one.media)
        assert (again.question, again.answer) == (one.question, one.answer)
    assert len(seen) > 40  # of 45
    with pytest.raises(IndexError):
        pairs[200]
    assert not any(one.question for one in map(CaptionedPairs(
        pairs.examples, 50, questions=False).__getitem__, range(50)))  # fmt: skip


def test_words_say_what_is_in_the_recording(tmp_path: Path) -> None:
    names = ["the digit zero", "the digit one", "the digit two"]
    pairs, seen = CaptionedPairs(folder(tmp_path / "d", SOUNDS), 200, seed=5), set()
    for number in range(len(pairs)):
        one = pairs[number]
        assert one.media.shape in {(2, 3), (4, 3)}
        heard = [names[int(value) - 50] for value in one.media[::2, 0]]
        shown = {"first": heard[0], "second": heard[1] if len(heard) > 1 else None}
        if not one.question:
            assert one.answer == RECORDINGS.caption(shown)
        else:
            place = one.question.removeprefix("what is heard ").removesuffix("?")
            assert one.answer == (shown[place] or NOTHING)
        seen.add((one.question, *heard))
        assert torch.equal(pairs[number].media, one.media)
    assert len(seen) > 32  # of 36


def test_sentences() -> None:
    alone = RECORDINGS.caption({"first": "a cat", "second": None})
    assert alone == "a recording of a cat alone"
    assert RECORDINGS.caption({"first": "an emu", "second": "a cat"}) == (
        "a recording of an emu and then a cat"
    )
    assert class_names(["seven", "two"]) == ["the digit seven", "the digit two"]
    assert PICTURES.caption({"left": "a cat", "right": None}) == "a picture of a cat on the left"
    assert PICTURES.caption({"left": None, "right": "a cat"}) == "a picture of a cat on the right"
    both = PICTURES.caption({"left": "an emu", "right": "a cat"})
    assert both == "a picture of an emu to the left of a cat"
    assert class_names(["cat", "emu"]) == ["a cat", "an emu"]


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MorError, match="names has 1 entries for 3 classes"):
        CaptionedPairs(folder(tmp_path / "a"), 5, names=["x"])
