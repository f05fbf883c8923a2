from __future__ import annotations

from pathlib import Path

import pytest

from tests.tiny import prepare_tiny


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared data folder; read only."""
    return prepare_tiny(tmp_path_factory.mktemp("tiny"))
