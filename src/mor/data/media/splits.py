"""Which examples are held out, and which are copies of others."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from mor.data.media.index import TEST, TRAIN, VALIDATION
from mor.data.media.writer import Examples


@dataclass(frozen=True)
class Fractions:
    """What is held out of each class, where the source has no split of its own."""

    validation: float
    test: float
    seed: int


def split_off(examples: Examples, fraction: float, seed: int) -> Examples:
    """Take a part of each class out of `examples`, and return it, both in their old order.

    A class of several keeps one at least, and gives one at least unless `fraction` is 0. Which
    ones depends on the seed and on how many there are, not on what they show.
    """
    taken: set[int] = set()
    labels = np.asarray(examples.labels, dtype=np.int64)
    for label in np.unique(labels):
        places = np.flatnonzero(labels == label)
        count = round(fraction * len(places))
        if fraction > 0:
            count = min(max(count, 1), len(places) - 1)
        order = np.random.default_rng([seed, int(label)]).permutation(len(places))
        taken.update(int(place) for place in places[order[:count]])
    out, kept = Examples(), Examples()
    for place, (value, label) in enumerate(zip(examples.values, examples.labels, strict=True)):
        (out if place in taken else kept).add(value, label)
    examples.values[:], examples.labels[:] = kept.values, kept.labels
    return out


def drop_copies(splits: Mapping[str, Examples]) -> list[tuple[str, int]]:
    """Leave out exact copies, so that what is tested was never trained on.

    Of several the first of the test split stays, else of the validation split, else of training,
    whatever their labels.

    Returns:
        split and place, in it as it was, of each copy.
    """
    seen: set[bytes] = set()
    copies = []
    for split in (TEST, VALIDATION, TRAIN):
        if split not in splits:
            continue
        kept, examples = Examples(), splits[split]
        for place, (value, label) in enumerate(zip(examples.values, examples.labels, strict=True)):
            content = hashlib.sha256(repr(value.shape).encode() + value.tobytes()).digest()
            if content in seen:
                copies.append((split, place))
                continue
            seen.add(content)
            kept.add(value, label)
        examples.values[:], examples.labels[:] = kept.values, kept.labels
    return copies
