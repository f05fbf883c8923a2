"""Synthetic run folders: the file formats of training and evaluation, with chosen numbers."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

WORDS = ["To", "be", ",", "or", "not", "to", "be", ":", "that", "is", "the", "question", "'tis"]


def write_run(
    folder: Path,
    family: str = "mor",
    router: str = "threshold",
    num_recursions: int = 3,
    nll: float = 3.9,
    rows: int = 60,
    summary: dict[str, Any] | None = None,
    evaluation: dict[str, Any] | None = None,
) -> Path:
    """Write one run folder; ``summary`` and ``evaluation`` override single keys (None: remove)."""
    folder.mkdir(parents=True)
    noise = random.Random(folder.name)
    routed = router not in ("none", "fixed")
    shares = [(num_recursions - depth) / num_recursions for depth in range(num_recursions)]
    tokens = int(2e6 * (1.3 if routed else 1.0))
    head = {
        "name": folder.name,
        "family": family,
        "router": router,
        "num_recursions": num_recursions,
        "parameters": 3_512_320 if num_recursions == 1 else 1_732_864,
        "non_embedding_parameters": 2_463_744,
        "tokens": tokens,
        "steps": rows * 10,
        "train_flops": 3.21e13,
        "wall_s": 151.2,
        "tokens_per_s": 13_456.7,
        "peak_memory_bytes": 612 * 2**20,
        "seed": 1,
        "commit": "0123456789abcdef0123456789abcdef01234567",
        "machine": "Some processor, 2 cores, 24 GiB memory, Linux",
        "versions": {"python": "3.11.7", "torch": "2.13.0"},
        "command": f"mor train recipes/demo/{folder.name}.yaml --set seed=1",
        **({"capacities": shares} if routed else {}),
    }
    (folder / "summary.json").write_text(json.dumps(_override(head, summary)))
    lines = []
    for row in range(1, rows + 1):
        part = row / rows
        loss = nll + 4.4 * math.exp(-9 * part) + 0.5 * (1 - part) + noise.gauss(0, 0.05)
        line: dict[str, Any] = {
            "step": row * 10,
            "tokens": int(part * tokens),
            "flops": part * 3.21e13,
            "loss": loss + 0.02,
            "lm_loss": loss,
            "learning_rate": 1e-3,
        }
        if routed:
            for depth, share in enumerate(shares):
                line[f"router/active_fraction/{depth}"] = (
                    share
                    if depth == 0
                    else min(
                        1.0, max(0.0, share + noise.gauss(0, 0.03) + 0.3 * math.exp(-12 * part))
                    )
                )
            for depth in range(1, num_recursions):
                line[f"router/boundary/{depth}"] = depth * 0.2 + 0.3 * part + noise.gauss(0, 0.01)
                line[f"router/accuracy/{depth}"] = 1 - 0.3 * math.exp(-5 * part) - 0.01 * depth
        if row % 15 == 0:
            line["eval_nll"] = loss + 0.08
        lines.append(json.dumps(line) + "\n")
    (folder / "log.jsonl").write_text("".join(lines))
    passage = [(" " if index % 9 else "\n") + word for index, word in enumerate(WORDS * 9)]
    depths = [
        num_recursions if not routed else noise.choices(range(1, num_recursions + 1))[0]
        for _ in passage
    ]
    mean = sum(shares) if routed else float(num_recursions)
    score: dict[str, Any] = {
        "nll": nll,
        "perplexity": math.exp(nll),
        "bits_per_byte": nll / 3 / math.log(2),
    }
    score |= {"mean_depth": mean, "active_fraction": shares}
    body = {
        "data": "shakespeare",
        "split": "validation",
        "tokens": 98_304,
        "bytes_per_token": 3.0,
        "causal": score,
        "leaky": {**score, "nll": nll - 0.004} if routed else None,
        "gap": 0.004 if routed else None,
        "depth_cap": [
            {"max_depth": cap, "nll": nll + 0.03 * (num_recursions - cap) ** 2, "mean_depth": cap}
            for cap in range(1, num_recursions + 1)
        ],
        "router": {"accuracy": [0.97, 0.95], "dead_tokens": 0.01} if routed else None,
        "sample": {
            "tokens": passage,
            "depths": depths,
            "nll": [round(noise.expovariate(0.3), 3) for _ in passage],
        },
    }
    (folder / "eval.json").write_text(json.dumps(_override(body, evaluation)))
    return folder


def _override(base: dict[str, Any], changes: dict[str, Any] | None) -> dict[str, Any]:
    merged = {**base, **(changes or {})}
    return {key: value for key, value in merged.items() if value is not None}


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., Path]:
    """Return a function (name, **options) -> run folder, see :func:`write_run`."""
    return lambda name, **options: write_run(tmp_path / "runs" / name, **options)


@pytest.fixture(autouse=True)
def _quick_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw fewer pixels: nothing here measures sharpness."""
    monkeypatch.setattr("mor.report.style.DPI", 72)


@pytest.fixture
def four_runs(make_run: Callable[..., Path]) -> list[Path]:
    """The demo's comparison: vanilla, recursive, and two routed models."""
    return [
        make_run("vanilla", family="vanilla", router="none", num_recursions=1, nll=3.85),
        make_run("recursive", family="recursive", router="fixed", nll=3.88),
        make_run("mor-expert", router="expert_choice", nll=3.9),
        make_run("mor-threshold", router="threshold", nll=3.87),
    ]
