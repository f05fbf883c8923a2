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


def test_more_than_eight_difficulties_go_on_beneath() -> None:
    score = {
        "exact_match": 1.0, "mean_depth": 2.77, "query_depth": 3.09, "rank_correlation": 0.945,
        "level_rank_correlation": 1.0, "by_level": dict.fromkeys(map(str, range(1, 13)), 1.0),
        "depth_by_level": {str(level): level / 2 for level in range(1, 13)},
    }  # fmt: skip
    caps = [{**score, "max_depth": cap, "fixed": 4329, "broke": 999} for cap in (1, 2)]
    console = Console(width=80, file=io.StringIO(), legacy_windows=False)
    console.print(answer_table({"causal": score, "depth_cap": caps, "random_routes": None}))
    assert isinstance(console.file, io.StringIO)
    said = console.file.getvalue()
    assert "…" not in said
    assert said.count("100") == 2 * (1 + 12)  # two rows: the total and twelve difficulties
    assert said.count("at most 2") == 2
    assert said.count("rank correlation") == 1
    assert "6.0" in said
