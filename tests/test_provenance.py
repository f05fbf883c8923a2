"""Where numbers come from, and the JSON lines that carry them."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mor import provenance as module
from mor.disk import append_jsonl
from mor.provenance import provenance
from mor.report.records import read_log


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
    done = subprocess.run(
        ["git", *identity, *arguments], cwd=folder, check=True, capture_output=True, text=True
    )
    return done.stdout.strip()


def test_header_has_the_four_fields(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["/somewhere/bin/mor", "train", "a recipe.yaml"])
    header = provenance(device="Some GPU")
    assert set(header) == {"commit", "machine", "versions", "command"}
    assert header["command"] == "mor train 'a recipe.yaml'"
    assert header["machine"].endswith(", Some GPU")
    assert "core" in header["machine"]
    assert header["versions"]["python"] == ".".join(map(str, sys.version_info[:3]))
    assert "torch" in header["versions"]
    json.dumps(header)


def test_module_runs_are_named_as_typed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["/somewhere/mor/__main__.py", "eval"])
    assert module.command() == "python -m mor eval"


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_commit_is_ours_and_tells_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "src" / "mor"
    foreign = tmp_path / "venv" / "mor"
    for folder in (package, foreign):
        folder.mkdir(parents=True)
        (folder / "provenance.py").write_text("one")
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-q", "-m", "x")
    head = git(tmp_path, "rev-parse", "HEAD")
    monkeypatch.setattr(module, "__file__", str(package / "provenance.py"))
    assert module.commit() == head
    (package / "provenance.py").write_text("two")
    assert module.commit() == head + "-dirty"
    monkeypatch.setattr(module, "__file__", str(foreign / "provenance.py"))
    assert not str(module.commit()).startswith(head)


def test_jsonl_is_strict(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "log.jsonl"
    append_jsonl(path, {"step": 1, "loss": float("nan"), "all": [float("inf"), 0.5], "é": "ü"})
    assert path.read_text(encoding="utf-8") == (
        '{"step": 1, "loss": null, "all": [null, 0.5], "é": "ü"}\n'
    )


@given(count=st.integers(0, 6), cut=st.integers(0, 400))
def test_appending_after_any_cut_leaves_a_readable_log(
    tmp_path_factory: pytest.TempPathFactory, count: int, cut: int
) -> None:
    path = tmp_path_factory.mktemp("cut") / "log.jsonl"
    rows = [{"step": step, "loss": step / 7, "pad": "é" * 20} for step in range(count)]
    for row in rows:
        append_jsonl(path, row)
    whole = path.read_bytes() if count else b""
    path.write_bytes(whole[:cut])
    append_jsonl(path, {"step": 100})
    steps = [row["step"] for row in read_log(path)]
    ends = [len(b"\n".join(whole.split(b"\n")[: kept + 1])) for kept in range(count)]
    assert steps == [*(step for step, end in enumerate(ends) if end <= cut), 100]


def test_appending_crosses_a_long_broken_tail(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 1}\n{"step": 2, "text": "' + "x" * 20_000)
    append_jsonl(path, {"step": 3})
    assert path.read_text() == '{"step": 1}\n{"step": 3}\n'
