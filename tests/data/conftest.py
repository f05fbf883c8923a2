"""A small folder of documents and what is prepared from it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from mor.data import DataIndex, prepare
from tests.data.streams import texts, write_parquet

WORDS = ["the", "king", "said", "to", "thee", "and", "thou", "my", "lord", "crown", "of", "night"]


def _text(number: int) -> str:
    """A text that no other number gives."""
    words = [WORDS[(number + i * i) % len(WORDS)] for i in range(60)]
    return f"Scene {number}. {' '.join(words)}.\n"


def _write(folder: Path, num_documents: int = 12) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(num_documents):
        (folder / f"{number:02d}.txt").write_text(_text(number), encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def write_corpus() -> Callable[..., Path]:
    """`write_corpus(folder, num_documents=12)` fills the folder with documents."""
    return _write


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve documents of text; read only."""
    return _write(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="session")
def prepared(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> DataIndex:
    """`corpus` prepared with a vocabulary of 300 in several shards; read only."""
    out = tmp_path_factory.mktemp("prepared") / "data"
    return prepare(corpus, out, vocab_size=300, validation_fraction=0.25, shard_tokens=300)


@pytest.fixture
def copy(prepared: DataIndex, tmp_path: Path) -> Path:
    """A copy of the prepared folder that a test may damage."""
    return shutil.copytree(prepared.directory, tmp_path / "copy")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset as the hub keeps it: Parquet files in parts, two splits."""
    folder = tmp_path_factory.mktemp("dataset")
    (folder / "data").mkdir()
    for part in range(3):
        values: list[str | None] = [*texts(10, 10 * part)]
        write_parquet(folder / "data" / f"train-0000{part}-of-00003.parquet", values)
    write_parquet(folder / "data" / "validation-00000-of-00001.parquet", [*texts(3, 100)])
    return folder
