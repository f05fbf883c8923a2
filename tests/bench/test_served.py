"""The benchmark of served answers: every round computes every prompt, and right is counted."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from mor.data import prepare
from tests.strategies import make_model, small_config

FILE = Path(__file__).resolve().parents[2] / "benchmarks" / "depth" / "served.py"


def test_no_round_finds_its_prompts_in_a_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = importlib.util.spec_from_file_location("served", FILE)
    assert spec is not None
    assert spec.loader is not None
    served = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(served)
    prepare("task:hops:documents=40,symbols=4,hops=3", tmp_path / "data", validation_fraction=0.3)
    engines: list[Any] = []

    def make(*args: Any, **options: Any) -> Any:
        engines.append(engine(*args, **options))
        return engines[-1]

    engine = served.Engine
    monkeypatch.setattr(served, "Engine", make)
    monkeypatch.setattr(served, "load_model", lambda name: make_model(small_config("threshold")))
    words = [
        "--data",
        str(tmp_path / "data"),
        "--system",
        "a=x",
        "--requests",
        "6",
        "--rounds",
        "2",
    ]
    monkeypatch.setattr(sys, "argv", ["served.py", *words])
    served.main()
    line = json.loads(capsys.readouterr().out)
    # 4 facts, and 7 queries with answers before the last one.
    assert line["prompt_tokens"] == 6 * (4 + 2 * 7 + 1)
    assert engines[0].stats.requests == 3 * 6
    assert engines[0].stats.reused_tokens == 0
    prepare("task:mano:documents=40", tmp_path / "mano", validation_fraction=0.3)
    with pytest.raises(AssertionError, match="unequal lengths; take task:hops"):
        served.read_requests(tmp_path / "mano", 6)
