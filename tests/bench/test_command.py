from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from mor.bench.forced import bench_config, bench_model
from mor.cli.app import app
from mor.errors import MorError
from tests.tiny import prepare_tiny


def test_the_command(tmp_path: Path) -> None:
    table = tmp_path / "table.md"
    words = ["bench", "serve", "--preset", "tiny", "--system", "vanilla", "--system", "mor2"]
    words += ["--requests", "4", "--scale", "0.02", "--concurrency", "1,2,4", "--rounds", "1"]
    words += ["--threads", "1", "--p95", "1000", "--markdown", str(table)]
    words += ["--workload", "paper,protocol", "--out", str(tmp_path / "out.jsonl")]
    done = CliRunner().invoke(app, words, catch_exceptions=False)
    assert done.exit_code == 0
    assert "clients" in done.output
    assert "Most tokens/s with p95 between tokens within 1000 ms" in done.output
    text = table.read_text()
    for name in ("paper c1", "paper c4", "protocol c32", "protocol c32 relative"):
        assert f"**{name}**" in text
    assert len((tmp_path / "out.jsonl").read_text().splitlines()) == 10


def test_the_command_refuses_what_is_wrong() -> None:
    for words, match in (
        (["--concurrency", "0"], "concurrency='0'"),
        (["--workload", "papers"], "workload='papers'"),
        (["--system", "transformers"], "one of our own models"),
    ):
        with pytest.raises(MorError, match=match):
            CliRunner().invoke(
                app, ["bench", "serve", "--preset", "tiny", *words], catch_exceptions=False
            )


def test_trained_models_and_prompts_from_their_text(tmp_path: Path) -> None:
    for name, recursions in (("plain", 1), ("routed", 3)):
        bench_model(bench_config("tiny", recursions), seed=3).save_pretrained(tmp_path / name)
    data = prepare_tiny(tmp_path / "text")
    words = ["bench", "serve", "--system", f"vanilla={tmp_path / 'plain'}", "--rounds", "1"]
    words += ["--system", f"demo={tmp_path / 'routed'}", "--system", "fake", "--threads", "1"]
    words += ["--preset", "tiny", "--workload", "prompts", "--data", str(data)]
    words += ["--requests", "3", "--scale", "0.03", "--concurrency", "2"]
    out = tmp_path / "out.jsonl"
    done = CliRunner().invoke(app, [*words, "--out", str(out)], catch_exceptions=False)
    assert done.exit_code == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [one["system"] for one in rows] == ["vanilla", "demo", "fake"]
    assert not any(one.get("forced_exits") for one in rows)
    assert rows[1]["against"] == "vanilla"
    assert 1 < rows[1]["mean_depth"] < 3
