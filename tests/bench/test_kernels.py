"""``mor bench kernels``: a line per kernel and size, none faster than what was measured as best."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from mor.bench import kernels
from mor.bench.forced import bench_config
from mor.bench.kernels import Best, measure_kernels
from mor.cli.app import app
from mor.errors import MorError
from mor.ops import native


@pytest.mark.skipif(native.library() is None, reason=native.missing())
def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels.measure_kernels, "__defaults__", (1, 1 << 18, ((2, 20),)))
    words = ["bench", "kernels", "--preset", "tiny", "--rows", "1,5", "--rounds", "1"]
    out = tmp_path / "out.jsonl"
    done = CliRunner().invoke(app, [*words, "--out", str(out)], catch_exceptions=False)
    assert done.exit_code == 0
    assert "GFLOP/s in registers" in done.output
    machine, *rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert machine["kind"] == "machine"
    assert machine["gflop_per_s"] > 1
    products = [row for row in rows if row["kind"] == "product"]
    assert {row["rows"] for row in products} == {1, 5}
    assert sum("int8" in row["name"] for row in products) == len(products) / 2
    assert any("both ways" in row["name"] for row in rows)
    assert all(row["us"] > 0 and row["of_best"] > 0 for row in rows)


def test_the_least_time_is_that_of_the_scarcer() -> None:
    best = Best(flops_per_s=100.0, bytes_per_s=10.0)
    assert best.seconds(200.0, 10.0) == 2
    assert best.seconds(200.0, 50.0) == 5


def test_without_kernels_it_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels.native, "library", lambda: None)
    monkeypatch.setattr(kernels.native, "missing", lambda: "no compiler found")
    with pytest.raises(MorError, match="no compiler found"):
        measure_kernels(bench_config("tiny", 1, None, "vanilla"), [1])
