"""Images and sounds that come as packages: fetched by pip, read as data, never run.

| source | what | package |
|---|---|---|
| `digits` | 1,797 written digits, 8 x 8, from 43 people | `scikit-learn` |
| `animal-mnist` | 10,000 silhouettes of ten animals, 28 x 28 | `animal-mnist` |
| `japanese-vowels` | 640 vowels of nine speakers, 12 LPC coefficients a frame | `sktime` |
"""

from __future__ import annotations

import gzip
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from mor.data.media.arrays import read_pickled_array
from mor.data.media.index import IMAGES, SOUNDS, TEST, TRAIN, VALIDATION
from mor.data.media.splits import Fractions, drop_copies, split_off
from mor.data.media.writer import Examples, Gathered
from mor.data.packages import WheelTags, fetch_wheel
from mor.errors import MorError

SKLEARN = (
    "scikit-learn",
    "1.7.2",
    "e5bf3d930aee75a65478df91ac1225ff89cd28e9ac7bd1196853a9229b6adb0b",
    WheelTags("cp312", "manylinux2014_x86_64.manylinux_2_17_x86_64"),
)
ANIMALS = (
    "animal-mnist",
    "0.4",
    "aeebf3d9de4552d6fd2d5701424e1a5b9020f8e5115d68df9db252f2f53ce2ce",
)
SKTIME = ("sktime", "1.2.0", "dbffc6731d2d683b668dceb5e2bbc5804bebc8446b4c580803a281684d90e4ae")
ANIMAL_NAMES = [
    *("bear", "bird", "cat", "cow", "dog", "elephant", "giraffe", "horse", "sheep", "zebra"),
]


def read_digits(fractions: Fractions) -> Gathered:
    """scikit-learn's digits: uint8 [8, 8, 1], 0 to 255 (the file has 0 to 16)."""
    text = gzip.decompress(_member(fetch_wheel(*SKLEARN), "sklearn/datasets/data/digits.csv.gz"))
    table = np.array([line.split(",") for line in text.decode().split()], dtype=np.int64)
    images = ((table[:, :-1] * 255 + 8) // 16).astype(np.uint8).reshape(-1, 8, 8, 1)
    licence = "BSD-3-Clause (scikit-learn); data of UCI, CC BY 4.0"
    return _split_images(images, table[:, -1], [str(n) for n in range(10)], fractions, licence)


def read_animals(fractions: Fractions) -> Gathered:
    """animal-mnist: uint8 [28, 28, 1], its exact copies left out before the split."""
    wheel = fetch_wheel(*ANIMALS)
    arrays = []
    for name in ("data", "label"):
        member = f"animal_mnist/data/Animal_MNIST/animal_{name}_version_3.gz"
        arrays.append(read_pickled_array(gzip.decompress(_member(wheel, member)), member))
    images, labels = arrays
    if images.shape != (10_000, 28, 28) or labels.shape != (10_000,):
        raise MorError(f"{wheel} holds arrays {images.shape} and {labels.shape}")
    return _split_images(images[..., None], labels, ANIMAL_NAMES, fractions, "MIT")


def read_vowels(fractions: Fractions) -> Gathered:
    """JapaneseVowels: float32 [7 to 29 frames, 12]; 270 to train and 370 to test, as it comes."""
    wheel, splits = fetch_wheel(*SKTIME), {}
    for split, name in ((TRAIN, "TRAIN"), (TEST, "TEST")):
        member = f"sktime/datasets/data/JapaneseVowels/JapaneseVowels_{name}.ts"
        splits[split] = _read_ts(_member(wheel, member).decode(), member)
    splits[VALIDATION] = split_off(splits[TRAIN], fractions.validation, fractions.seed)
    classes = [f"speaker {n}" for n in range(1, 10)]
    licence = "BSD-3-Clause (sktime); data of UCI (Kudo, Toyama, Shimbo), CC BY 4.0"
    return Gathered(SOUNDS, classes, splits, licence=licence)


def _read_ts(text: str, origin: str) -> Examples:
    """A `.ts` file of sktime: a line per example, dimensions and the class parted by colons."""
    examples = Examples()
    for line in text.partition("@data")[2].split():
        *dimensions, label = line.split(":")
        rows = [np.array(one.split(","), dtype=np.float32) for one in dimensions]
        if len({len(row) for row in rows}) != 1:
            raise MorError(f"{origin}: an example has dimensions of unequal length")
        examples.add(np.stack(rows, 1), int(label) - 1)
    return examples


def _split_images(
    images: np.ndarray,
    labels: np.ndarray,
    classes: list[str],
    fractions: Fractions,
    licence: str,
) -> Gathered:
    every = Examples(list(images), [int(label) for label in labels])
    splits: Mapping[str, Examples] = {TRAIN: every}
    copies = drop_copies(splits)
    test = split_off(every, fractions.test, fractions.seed)
    validation = split_off(every, fractions.validation, fractions.seed + 1)
    splits = {TRAIN: every, VALIDATION: validation, TEST: test}
    return Gathered(IMAGES, classes, splits, licence=licence, num_duplicates=len(copies))


def _member(wheel: Path, name: str) -> bytes:
    try:
        with zipfile.ZipFile(wheel) as archive:
            return archive.read(name)
    except (zipfile.BadZipFile, KeyError, OSError, zlib.error) as error:
        raise MorError(f"cannot read {name} in the archive {wheel}: {error}") from error
