from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers.utils import logging

from mor.cli import main
from tests.cli.done import Done
from tests.tiny import prepare_tiny, tiny_fields


@pytest.fixture(autouse=True)
def _quick_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw fewer pixels in reports: nothing here measures sharpness."""
    monkeypatch.setattr("mor.report.style.DPI", 72)


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared data folder; read only."""
    return prepare_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def mor_(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Any:
    """``mor_("eval", folder)`` runs a command in this process, as the console script does."""
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.delenv("MOR_DEBUG", raising=False)
    verbosity = logging.get_verbosity()

    def run(*words: Any) -> Done:
        monkeypatch.setattr(sys, "argv", ["mor", *map(str, words)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = capfd.readouterr()
        code = ended.value.code
        assert isinstance(code, int) or code is None
        return Done(code or 0, out, err)

    yield run
    logging.set_verbosity(verbosity)
    logging.enable_progress_bar()


@pytest.fixture(scope="session")
def recipe(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe file that trains two steps into its own folder."""
    root = tmp_path_factory.mktemp("recipes")
    fields = tiny_fields(data, root / "runs", "threshold")
    fields["train"] |= {"budget": {"steps": 2}}
    path = root / "recipe.yaml"
    path.write_text(yaml.safe_dump(fields))
    return path


@pytest.fixture(scope="session")
def run(recipe: Path) -> Path:
    """A finished run; read only."""
    from mor.train import load_recipe, train

    return train(load_recipe(recipe))
