"""The table of a task's answers is readable in a terminal of 80 columns."""

from __future__ import annotations

import io

import numpy as np
from rich.console import Console

from mor.cli.evaluate import answer_table
from mor.eval.answers import Answers


def test_eight_difficulties_fit_into_80_columns() -> None:
    levels = np.repeat(np.arange(1, 9), 2)
    score = Answers(levels, np.ones(16), np.clip(levels, 1, 4), 3.25).score()
    caps = [{"max_depth": cap, **score, "fixed": 14551, "broke": 10864} for cap in range(1, 5)]
    text = io.StringIO()
    console = Console(width=80, file=text)
    console.print(answer_table({"causal": score, "depth_cap": caps, "random_routes": score}))
    lines = text.getvalue().splitlines()
    assert max(map(len, lines)) <= 80
    assert "…" not in text.getvalue()
    row = next(line for line in lines if "at most 4" in line)
    assert row.split()[3:] == ["100.0", *["100"] * 8, "3.25", "14551", "10864"]
