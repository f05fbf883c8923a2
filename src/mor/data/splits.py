"""Which documents are trained on and which are kept for validation."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

from mor.errors import MorError


def check_fraction(fraction: float) -> None:
    """Raise `MorError` unless `fraction` is between 0 and 1, both left out."""
    if not 0.0 < fraction < 1.0:
        raise MorError(
            f"validation_fraction is {fraction}, expected more than 0 and less than 1, such as 0.05"
        )


def choose_validation(sizes: Mapping[str, int], fraction: float, seed: int) -> set[str]:
    """Choose whole documents for validation, about `fraction` of the bytes.

    Documents are taken in the order of a hash of seed and name, each if it brings the bytes
    taken nearer to the fraction asked for. So the choice depends on names, sizes and seed only,
    not on the order of the documents, and few large documents still give a usable split. At least
    one document is taken and at least one is left: the smallest, where nothing fits.

    Args:
        sizes: bytes of each document, by name.
        fraction: the part of all bytes to aim at, in (0, 1).
        seed: another seed, another choice.

    Raises:
        MorError: `fraction` is out of range, or there are fewer than two documents.
    """
    check_fraction(fraction)
    if len(sizes) < 2:
        raise MorError(
            f"a split by document needs at least 2 different documents with text, found "
            f"{len(sizes)}; divide the text into several files, or into lines of a .jsonl file"
        )
    order = sorted(sizes, key=lambda name: (_hash(seed, name), name))
    target = fraction * sum(sizes.values())
    chosen: set[str] = set()
    taken = 0
    for name in order:
        if abs(taken + sizes[name] - target) < abs(taken - target):
            chosen.add(name)
            taken += sizes[name]
    smallest = min(order, key=lambda name: sizes[name])
    if not chosen:
        chosen.add(smallest)
    elif len(chosen) == len(sizes):
        chosen.remove(smallest)
    return chosen


def is_held_out(text_hash: int, fraction: float) -> bool:
    """Whether a document of a stream is kept for validation, by a 64-bit hash of its text.

    The text decides, not its name or number: copies of one text are then always on the same side,
    however many there are and without remembering any.
    """
    return text_hash < int(fraction * 2**64)


def _hash(seed: int, name: str) -> bytes:
    # Names are file names, which need not be valid Unicode.
    return hashlib.sha256(f"{seed}\0{name}".encode("utf-8", "surrogateescape")).digest()
