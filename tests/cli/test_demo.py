"""``mor demo`` from text to report, tiny; and again, keeping what is there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from mor.cli.app import app

TWINS = ("vanilla", "recursive", "expert_choice", "threshold")


def play(number: int) -> str:
    """A little text with some structure to learn."""
    lines = [f"KING {number}. What says the {w} to the {w}?" for w in ("sea", "wind", "stone")]
    return "\n".join(lines * 40)


def run_demo(out: Path, source: Path) -> str:
    """Run the command as a user does, but for its own process; returns what it printed."""
    command = ["demo", "--out", str(out), "--source", str(source)]
    command += ["--vocab-size", "300", "--set", "train.budget.steps=3"]
    command += ["--set", "train.report_to=[]", "--set", "data.seq_len=32"]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output[-2000:]
    return done.stdout


@pytest.mark.slow
def test_demo_leaves_a_report_and_can_run_again(tmp_path: Path) -> None:
    source = tmp_path / "plays"
    source.mkdir()
    for number in range(6):
        (source / f"{number}.txt").write_text(play(number), encoding="utf-8")
    out = tmp_path / "demo"
    said = run_demo(out, source)
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
    assert run_demo(out, source).count("kept from an earlier run") == 9
    after = {twin: (out / twin / "summary.json").stat().st_mtime_ns for twin in TWINS}
    assert before == after
