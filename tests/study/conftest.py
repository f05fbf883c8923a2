"""A study of two tiny rows."""

from __future__ import annotations

from pathlib import Path

import pytest

from mor.study import load_study
from mor.study.file import Study
from tests.study.studies import tiny_study, written
from tests.tiny import prepare_tiny


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare_tiny(tmp_path_factory.mktemp("study"))


@pytest.fixture
def study(data: Path, tmp_path: Path) -> Study:
    return load_study(written(tmp_path, tiny_study(data)))
