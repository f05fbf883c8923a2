"""Pictures and sounds out of packages: nothing in them is run."""

from __future__ import annotations

import gzip
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from mor.data.media import packaged
from mor.data.media.arrays import read_pickled_array
from mor.data.media.packaged import read_animals, read_digits, read_vowels
from mor.data.media.splits import Fractions
from mor.errors import MorError

FRACTIONS = Fractions(0.25, 0.25, 0)


# Packages --------------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize(
    "array",
    [
        np.arange(24, dtype=np.uint8).reshape(2, 3, 4),
        np.arange(5, dtype=np.int64),
        np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        np.array([[1.5]], dtype=">f4"),
    ],
)
def test_a_pickled_array_without_unpickling(protocol: int, array: np.ndarray) -> None:
    data = pickle.dumps(array, protocol)
    if protocol in (2, 5):  # bytes by way of a codec, and as a buffer: not what the package has
        try:
            found = read_pickled_array(data, "it")
        except MorError:
            return
    else:
        found = read_pickled_array(data, "it")
    assert np.array_equal(found, array)


class Evil:
    def __reduce__(self) -> tuple[Callable[..., None], tuple[str]]:
        return print, ("run",)


@pytest.mark.parametrize("wrong", [Evil(), [1, 2], "text", np.array([None, 1]), {"a": 1}])
def test_anything_else_is_refused_and_not_run(
    wrong: object, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(MorError, match="is not a pickled NumPy array"):
        read_pickled_array(pickle.dumps(wrong, 4), "it")
    assert capsys.readouterr().out == ""


def test_a_pickle_that_is_cut_short() -> None:
    data = pickle.dumps(np.arange(100), 4)
    for length in range(0, len(data), 7):
        with pytest.raises(MorError):
            read_pickled_array(data[:length], "it")


def wheel(folder: Path, files: dict[str, bytes]) -> Callable[..., Path]:
    path = folder / "package.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return lambda *wanted: path


def test_digits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [[(n + p) % 17 for p in range(64)] + [n % 10] for n in range(40)]
    table = gzip.compress("\n".join(",".join(map(str, row)) for row in rows).encode())
    made = wheel(tmp_path, {"sklearn/datasets/data/digits.csv.gz": table})
    monkeypatch.setattr(packaged, "fetch_wheel", made)
    gathered = read_digits(FRACTIONS)
    images = [v for examples in gathered.splits.values() for v in examples.values]
    assert gathered.num_duplicates == 23  # 17 pictures; of each the first stays
    assert len(images) == 17
    assert images[0].shape == (8, 8, 1)
    assert {int(i.max()) for i in images} == {255}
    assert {int(i.min()) for i in images} == {0}


def test_animals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = np.zeros((10_000, 28, 28), np.uint8)
    images[:, 0, 0], images[:, 0, 1] = np.arange(10_000) % 256, np.arange(10_000) // 256
    images[7] = images[3]
    labels = np.arange(10_000) % 10
    folder = "animal_mnist/data/Animal_MNIST"
    files = {
        f"{folder}/animal_{name}_version_3.gz": gzip.compress(pickle.dumps(array, 4), 1)
        for name, array in (("data", images), ("label", labels))
    }
    monkeypatch.setattr(packaged, "fetch_wheel", wheel(tmp_path, files))
    gathered = read_animals(Fractions(0.1, 0.2, 0))
    assert gathered.num_duplicates == 1
    assert sum(len(examples.labels) for examples in gathered.splits.values()) == 9_999
    assert gathered.classes[1] == "bird"


def test_vowels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def lines(number: int) -> bytes:
        rows = [
            ":".join([",".join([f"{d + n / 10}"] * (n + 2)) for d in range(12)] + [str(n % 9 + 1)])
            for n in range(number)
        ]
        return ("#about\n@classLabel true 1 2\n@data\n" + "\n".join(rows) + "\n").encode()

    folder = "sktime/datasets/data/JapaneseVowels/JapaneseVowels"
    made = wheel(tmp_path, {f"{folder}_TRAIN.ts": lines(18), f"{folder}_TEST.ts": lines(9)})
    monkeypatch.setattr(packaged, "fetch_wheel", made)
    gathered = read_vowels(FRACTIONS)
    assert {name: len(e.labels) for name, e in gathered.splits.items()} == {
        "train": 9,
        "validation": 9,
        "test": 9,
    }
    first = gathered.splits["test"].values[0]
    assert first.shape == (2, 12)
    assert first[0].tolist() == [float(d) for d in range(12)]
    broken = {f"{folder}_TRAIN.ts": b"@data\n1,2:1:3\n", f"{folder}_TEST.ts": lines(9)}
    monkeypatch.setattr(packaged, "fetch_wheel", wheel(tmp_path, broken))
    with pytest.raises(MorError, match="unequal length"):
        read_vowels(FRACTIONS)


def test_a_package_without_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packaged, "fetch_wheel", wheel(tmp_path, {"other": b""}))
    with pytest.raises(MorError, match=r"cannot read sklearn/datasets/data/digits\.csv\.gz"):
        read_digits(FRACTIONS)
