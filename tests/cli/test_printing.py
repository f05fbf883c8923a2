"""What commands print: once for all ranks, and no zero with a minus before it."""

from __future__ import annotations

import math
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from rich.console import Console
from rich.table import Table

from mor.cli import main
from mor.cli.evaluate import pass_table, router_table, score_table
from mor.eval.card_text import score_section
from mor.model.metrics import entropy, max_violation
from mor.report.tables import _nll
from tests.tiny import tiny_fields

SOURCE = Path(__file__).resolve().parents[2] / "src" / "mor"
TINY = -1e-9


def shown(table: Table) -> str:
    console = Console(width=200)
    with console.capture() as capture:
        console.print(table)
    return capture.get()


def test_one_depth_for_all_has_entropy_zero_and_no_minus() -> None:
    for shares in ([0.0, 1.0, 0.0], [0.0, 1.0]):
        for value in (entropy(torch.tensor(shares)), max_violation(torch.tensor([0.0, 0.5, 0.5]))):
            assert value == 0
            assert math.copysign(1, value) == 1


def test_no_table_shows_a_negative_zero() -> None:
    score = {"nll": TINY, "perplexity": 1.0, "bits_per_byte": TINY, "mean_depth": TINY}
    caps = [{"max_depth": cap, "nll": TINY, "mean_depth": TINY} for cap in (1, 2)]
    result: dict[str, Any] = {
        "causal": score | {"active_fraction": [1.0, TINY]},
        "leaky": score,
        "gap": TINY,
        "random_routes_nll": 0.0,
        "quantized": score | {"quantization": "int8", "loss": TINY},
        "depth_cap": caps,
        "passes": [{"max_depth": 1, "nll": TINY, "accuracy": TINY}],
        "router": {"accuracy": [TINY, 1.0], "dead_tokens": TINY, "max_vio": TINY, "entropy": TINY},
        "tokens": 9,
        "sequences": 1,
        "seq_len": 8,
        "split": "validation",
    }
    text = shown(score_table(result)) + shown(router_table(result)) + shown(pass_table(result))
    text += score_section(result) + _nll(TINY)
    assert "+0.0000" in text
    assert not re.search(r"-0\.?0*(?![\d.]*[1-9])\b", text), text


@pytest.mark.parametrize("room", ["cli", "eval", "report", "train/logs/log.py"])
def test_every_figure_is_printed_without_negative_zeros(room: str) -> None:
    """Format specifications of figures have Python's z."""
    root = SOURCE / room
    for path in [root] if root.is_file() else root.rglob("*.py"):
        bare = re.findall(r"\{[^{}\n]*:[+]?,?\.(?:\d|\{\w+\})[f%]\}", path.read_text("utf-8"))
        # Sizes, times, speeds and loads are never negative.
        assert not [each for each in bare if path.name not in ("bench.py", "plan.py", "data.py")], (
            path
        )


# Ranks --------------------------------------------------------------------------------------------


def run(words: list[str], monkeypatch: pytest.MonkeyPatch) -> int | str | None:
    monkeypatch.setattr(sys, "argv", ["mor", *words])
    with pytest.raises(SystemExit) as ended:
        main()
    return ended.value.code


def test_only_the_first_rank_speaks(
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(tiny_fields(data, tmp_path)))
    for rank, spoken in (("0", True), ("1", False)):
        monkeypatch.setenv("RANK", rank)
        assert not run(["train", str(recipe), "--dry-run"], monkeypatch)
        assert ("unique parameters" in capsys.readouterr().out) is spoken
    # A mistake is told by whoever met it.
    assert run(["train", str(tmp_path / "none.yaml")], monkeypatch) == 2
    assert capsys.readouterr().err.startswith("error on rank 1: ")
    monkeypatch.setattr("mor.cli.training.run_training", lambda *args, **options: None)
    monkeypatch.setattr("mor.cli.training.card_after_training", lambda folder: None)
    for rank, count in (("0", 1), ("1", 0)):
        monkeypatch.setenv("RANK", rank)
        run(["train", str(recipe)], monkeypatch)
        assert capsys.readouterr().out.count("trained:") == count
