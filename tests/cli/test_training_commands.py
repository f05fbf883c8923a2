"""``mor train`` after something went wrong, and its branches: what it says and how it ends."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers.utils import logging

from mor.cli import main
from mor.train import Recipe, dump_recipe, train
from mor.train.state import checkpoints
from tests.tiny import prepare_tiny, tiny_recipe

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Any:
    """``command("train", recipe)``: exit code, standard output, standard error."""
    monkeypatch.delenv("MOR_DEBUG", raising=False)
    monkeypatch.setenv("COLUMNS", "200")

    def run(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["mor", *map(str, words)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as left:
            main()
        out, err = capfd.readouterr()
        return int(left.value.code or 0), out, err

    verbosity = logging.get_verbosity()
    yield run
    logging.set_verbosity(verbosity)
    logging.enable_progress_bar()


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    fields = {"save_steps": 2, "save_total_limit": 9, "warmup_steps": 2}
    return tiny_recipe(prepare_tiny(tmp_path), tmp_path / "runs", **fields)


@pytest.fixture
def file(recipe: Recipe, tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(dump_recipe(recipe))
    return path


def unfinish(run: Path) -> None:
    (run / "summary.json").unlink()


def test_a_damaged_checkpoint(command: Command, recipe: Recipe, file: Path) -> None:
    """Refused with exit code 2 and the command that goes on; that command works."""
    run = train(recipe)
    before = (run / "model" / "model.safetensors").read_bytes()
    unfinish(run)
    weights = run / "checkpoints" / "checkpoint-8" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    code, _, err = command("train", file, "--resume")
    assert code == 2
    [line] = err.strip().splitlines()
    assert "checkpoint-8 is damaged: model.safetensors has 1000 bytes" in line
    assert line.endswith("go on from there with --resume-from checkpoint-6")
    code, out, _ = command("train", file, "--resume-from", "checkpoint-6")
    assert (code, out) == (0, f"trained: {run}\n")
    assert (run / "model" / "model.safetensors").read_bytes() == before


def test_a_branch(command: Command, recipe: Recipe, file: Path, tmp_path: Path) -> None:
    run = train(recipe)
    words = ("--set", "name=a branch", "--set", "train.budget.steps=7")
    source = run / "checkpoints" / "checkpoint-4"
    code, _, err = command("train", file, *words, "--branch-from", source)
    assert code == 2
    assert "name='a branch'" in err
    words = ("--set", "name=branch", "--set", "train.budget.steps=7")
    code, out, _ = command("train", file, *words, "--branch-from", source)
    assert (code, out) == (0, f"trained: {tmp_path / 'runs' / 'branch'}\n")
    summary = json.loads((tmp_path / "runs" / "branch" / "summary.json").read_text())
    assert (summary["branched_from"], summary["steps"]) == (str(source), 7)
    code, _, err = command("train", file, *words, "--branch-from", run, "--overwrite")
    assert code == 2
    assert "must be RUN/checkpoints/checkpoint-N of a run" in err


def test_a_fan(command: Command, file: Path, tmp_path: Path) -> None:
    fan = ("--set", "train.branches=[{steps: 6}, {tokens: 320}]")
    code, out, _ = command("train", file, *fan, "--dry-run")
    assert code == 0
    assert [name in out for name in (" tiny ", " tiny-5 ", " tiny-6 ")] == [True] * 3
    code, out, _ = command("train", file, *fan)
    runs = [tmp_path / "runs" / name for name in ("tiny", "tiny-5", "tiny-6")]
    assert (code, out) == (0, "".join(f"trained: {run}\n" for run in runs))
    assert all((run / "model" / "config.json").is_file() for run in runs)
    assert {4} < {
        checkpoints.step_of(p) for p in checkpoints.list_checkpoints(runs[0] / "checkpoints")
    }
