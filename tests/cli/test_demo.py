"""``mor demo`` from text to report, tiny; and again, keeping what is there."""

from __future__ import annotations

import json
from pathlib import Path
from threading import Lock

import pytest
from typer.testing import CliRunner

from mor.cli import demo, depth_demo
from mor.cli.app import app
from mor.train import load_recipe, train

TWINS = ("vanilla", "recursive", "expert_choice", "threshold")


def play(number: int) -> str:
    """A little text with some structure to learn."""
    lines = [f"KING {number}. What says the {w} to the {w}?" for w in ("sea", "wind", "stone")]
    return "\n".join(lines * 40)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Few documents of formulas; returns the twins that were trained.

    The first has a process of its own, as all have for a user. A process takes longer to start
    than to train three steps, so the others are trained here, beside it.
    """
    trained: list[str] = []
    start, one_at_a_time = demo.train_twin, Lock()

    def train_twin(name: str, changes: list[str]) -> int:
        trained.append(name)
        if name == TWINS[0]:
            return start(name, changes)
        with one_at_a_time:
            train(load_recipe(f"demo/{name}", changes), overwrite=True)
        return 0

    monkeypatch.setattr(demo, "train_twin", train_twin)
    monkeypatch.setattr(depth_demo, "SOURCE", "task:formulas:documents=60,seed=1")
    return trained


def run_demo(out: Path, source: Path) -> str:
    """Run the command as a user does, but for its own process; returns what it printed."""
    command = ["demo", "--out", str(out), "--source", str(source)]
    command += ["--vocab-size", "300", "--set", "train.budget.steps=3"]
    command += ["--set", "train.report_to=[]", "--set", "data.seq_len=32"]
    command += ["--set", "train.peak_flops=1e9"]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output[-2000:]
    return done.stdout


@pytest.mark.slow
def test_demo_leaves_a_report_and_can_run_again(
    tmp_path: Path, small: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "plays"
    source.mkdir()
    for number in range(6):
        (source / f"{number}.txt").write_text(play(number), encoding="utf-8")
    out = tmp_path / "demo"
    said = run_demo(out, source)
    assert sorted(small) == sorted(TWINS)
    assert "depth cap 1" in said
    assert "recursions per token" in said
    page = (out / "report" / "index.html").read_text(encoding="utf-8")
    for twin in TWINS:
        summary = json.loads((out / twin / "summary.json").read_text(encoding="utf-8"))
        scored = json.loads((out / twin / "eval.json").read_text(encoding="utf-8"))
        assert summary["steps"] == 3
        assert scored["causal"]["nll"] > 0
        assert twin in page
        assert (scored["leaky"] is not None) == (twin in ("expert_choice", "threshold"))
    before = {twin: (out / twin / "summary.json").stat().st_mtime_ns for twin in TWINS}
    # The report is made anew in every run; its pictures take seconds.
    reported: list[Path] = []
    monkeypatch.setattr(demo, "build_report", lambda runs, *args, **kwargs: reported.extend(runs))
    assert run_demo(out, source).count("kept from an earlier run") == 9
    after = {twin: (out / twin / "summary.json").stat().st_mtime_ns for twin in TWINS}
    assert before == after
    assert reported == [out / twin for twin in TWINS]
    assert sorted(small) == sorted(TWINS)
