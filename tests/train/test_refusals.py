"""What a run does not overwrite, and what it says where it cannot begin."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mor.errors import MorError
from mor.train import Recipe, train
from tests.tiny import tiny_recipe, write_corpus

# Refusals --------------------------------------------------------------------------------------


def recipe_in(data: Path, output: Path, **train_fields: Any) -> Recipe:
    return tiny_recipe(data, output, budget={"steps": 2}, **train_fields)


def test_a_run_is_not_overwritten_unasked(data: Path, tmp_path: Path) -> None:
    recipe = recipe_in(data, tmp_path)
    folder = train(recipe)
    before = (folder / "summary.json").read_bytes()
    with pytest.raises(MorError, match="already holds a run; use --resume, --overwrite"):
        train(recipe)
    assert (folder / "summary.json").read_bytes() == before
    train(recipe, overwrite=True)
    assert (folder / "summary.json").read_bytes() != before


def test_overwrite_removes_runs_and_nothing_else(data: Path, tmp_path: Path) -> None:
    recipe = recipe_in(data, tmp_path)
    recipe.run_dir.mkdir()
    (recipe.run_dir / "thesis.tex").write_text("years of work")
    with pytest.raises(MorError, match=r"holds thesis\.tex, which no run has written"):
        train(recipe, overwrite=True)
    assert (recipe.run_dir / "thesis.tex").read_text() == "years of work"
    (recipe.run_dir / "thesis.tex").unlink()
    recipe.run_dir.rmdir()
    recipe.run_dir.write_text("a file")
    with pytest.raises(MorError, match="a file, not a folder"):
        train(recipe, overwrite=True)


def test_an_output_that_cannot_be_made(data: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(MorError, match="cannot be written"):
        train(recipe_in(data, tmp_path / "file"))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"batch_size": 500}, "fewer than the 1000 of one optimiser step"),
        ({"budget": {"flops": 10.0}}, "does not pay for one step"),
    ],
)
def test_what_cannot_be_run_leaves_no_folder(
    changes: dict[str, Any], words: str, data: Path, tmp_path: Path
) -> None:
    with pytest.raises(MorError, match=words):
        train(tiny_recipe(data, tmp_path, **changes))
    assert not list(tmp_path.iterdir())


def test_no_data(tmp_path: Path) -> None:
    with pytest.raises(MorError, match="does not exist; make it with mor data prepare"):
        train(tiny_recipe(tmp_path / "nothing", tmp_path))
    write_corpus(tmp_path / "text")
    with pytest.raises(MorError, match="is not a prepared data folder"):
        train(tiny_recipe(tmp_path / "text", tmp_path))
