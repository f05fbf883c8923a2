"""``mor uptrain`` as a user runs it: two stages from one command, and what it refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from mor import MoRConfig, MoRForCausalLM
from mor.hf.convert.llama import plain_depth
from mor.hf.load import load_model
from tests.cli.done import Mor, rows_of


@pytest.fixture
def place(tmp_path: Path, data: Path, mor_: Mor) -> Path:
    """A source, its folding, and a recipe for each of two stages."""
    torch.manual_seed(0)
    widths = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}
    model = MoRForCausalLM(MoRConfig(vocab_size=300, **widths, **plain_depth(6)))
    model.save_pretrained(tmp_path / "source")
    for path in (data / "tokenizer").iterdir():
        shutil.copy(path, tmp_path / "source" / path.name)
    done = mor_("fold", tmp_path / "source", "--num-recursions", 2, "--out", tmp_path / "folded")
    assert done.code == 0, done.err
    first: dict[str, Any] = {
        "name": "recursive",
        "uptrain": {
            "start": str(tmp_path / "folded"),
            "freeze": ["embeddings"],
            "distill": {"teacher": str(tmp_path / "source")},
        },
        "data": {"path": str(data), "seq_len": 16, "validation_path": str(data)},
        "train": {"budget": {"steps": 2}, "batch_size": 2, "eval_sequences": 2, "report_to": []},
        "output": str(tmp_path / "runs"),
    }
    second = {**first, "name": "mor", "model": {"router": "threshold"}}
    second["uptrain"] = {**first["uptrain"], "start": str(tmp_path / "runs" / "recursive")}
    for recipe in (first, second):
        (tmp_path / f"{recipe['name']}.yaml").write_text(yaml.safe_dump(recipe))
    return tmp_path


def test_two_stages(place: Path, mor_: Mor) -> None:
    stages = (place / "recursive.yaml", place / "mor.yaml")
    plan = mor_("uptrain", *stages, "--dry-run")
    assert plan.code == 0, plan.err
    rows = rows_of(plan.out)
    assert rows["family, router"] == "recursive, fixed"
    embedding = 300 * 16
    assert f"({embedding:,} frozen)" in rows["parameters trained"]
    assert rows["teacher's FLOPs"].endswith("it runs along)")
    assert "  teacher" in plan.out
    assert plan.out.splitlines()[-1] == (
        f"mor: its plan is known once {place / 'runs' / 'recursive'} is there"
    )
    assert not (place / "runs").exists()
    done = mor_("uptrain", *stages)
    assert done.code == 0, done.err
    runs = place / "runs"
    assert done.out.split("\n")[:2] == [
        f"trained: {runs / 'recursive'}",
        f"trained: {runs / 'mor'}",
    ]
    assert load_model(runs / "mor").config.router == "threshold"
    assert (runs / "mor" / "model" / "README.md").is_file()
    assert json.loads((runs / "mor" / "summary.json").read_text())["router"] == "threshold"
    assert mor_("uptrain", *stages).code == 2
    again = mor_("uptrain", *stages, "--resume")
    assert (again.code, again.out) == (0, "")


def test_what_is_refused(place: Path, mor_: Mor) -> None:
    stage = place / "recursive.yaml"
    twice = mor_("uptrain", stage, stage)
    assert twice.code == 2
    assert "stages share the run folder" in twice.err
    plain = mor_("uptrain", "demo/threshold")
    assert plain.code == 2
    assert "has no section uptrain" in plain.err
    wrong = mor_("uptrain", stage, "--set", "uptrain.freeze=[blocks]")
    assert wrong.code == 2
    assert "uptrain.freeze='blocks' is no group of parameters; did you mean 'block'" in wrong.err
    assert not (place / "runs").exists()
