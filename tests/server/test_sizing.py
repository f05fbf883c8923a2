"""The sizing page's figures come from the cost model, and it counts as the engine does."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mor.bench.sizing import MACHINES, bytes_per_token, pages_per_gib, requests_per_second
from mor.config.presets import preset
from mor.engine.memory import pages_for

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_bytes_are_those_of_the_engines_pages(depth: int) -> None:
    config = preset("135m")
    shares = [1.0] * depth + [0.0] * (3 - depth)
    page = (1 << 30) / pages_per_gib(config)
    told = pages_for(config, 1600, depth, 16) * page / 1600
    assert bytes_per_token(config, shares) == pytest.approx(told, rel=1e-4)
    assert bytes_per_token(config, shares, torch.bfloat16) == pytest.approx(told / 2, rel=1e-4)


def test_less_depth_and_more_machine_serve_more() -> None:
    config = preset("360m")
    for machine in MACHINES:
        rates = [
            requests_per_second(config, machine, (1.0, share, share), 512, 128, 32)
            for share in (1.0, 0.5, 0.0)
        ]
        assert rates == sorted(rates)
    core, *gpus = [requests_per_second(config, m, (1.0, 1.0, 1.0), 512, 128, 32) for m in MACHINES]
    assert 100 * core < gpus[0] < gpus[1]


def test_the_page_shows_what_the_script_prints() -> None:
    said = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "sizing.py")],
        capture_output=True, text=True, check=True, cwd=ROOT,
    ).stdout  # fmt: skip
    page = (ROOT / "docs" / "sizing.md").read_text("utf-8")
    lines = [line for line in said.splitlines() if line]
    assert len(lines) > 10
    assert [line for line in lines if line not in page] == []
