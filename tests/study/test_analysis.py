"""`mor analyse`: groups of tokens, tables, plots, the coloured passage."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from mor.cli.app import app
from mor.eval.routes import Routes
from mor.eval.words import Place
from mor.study.analysis import (
    Analysed,
    group_records,
    group_tables,
    groups_of,
    router_record,
    router_table,
)


@pytest.fixture
def analysed() -> Analysed:
    """Words of 30 whole words and 30 marks: words go deep, and only they gain by it."""
    parts = ["whole word", "punctuation"] * 30 + ["space"]
    depths = np.array([[2, 1] * 30 + [1]])
    gain = np.array([[0.5, 0.0] * 30])
    first = np.array([[False, True] * 30])
    return Analysed(
        Routes(
            ids=np.zeros((1, 61), dtype=int),
            depths=depths,
            nll=np.stack([1 + gain, np.ones_like(gain)]),
            hits=np.stack([first, np.ones_like(first)]),
            entropy=np.linspace(0.0, 3.0, 60)[None],
            scores=((np.array([0.0, 1.0]), np.array([False, True])),) * 2,
            boundaries=(0.5, 0.5),
        ),
        [[f" <{number}>" for number in range(61)]],
        [[Place(part, None) for part in parts]],
    )


def test_groups_of_tokens(analysed: Analysed) -> None:
    records = [router_record("m", analysed), *group_records("m", analysed)]
    by_group = {(r["question"], r.get("group")): r for r in records}
    word = by_group["place in the word", "whole word"]
    assert word["tokens"] == 30
    assert word["mean_depth"] == 2.0
    assert word["gain"] == pytest.approx(0.5)
    assert word["fixed"] == 1.0
    mark = by_group["place in the word", "punctuation"]
    assert (mark["mean_depth"], mark["gain"], mark["fixed"], mark["broke"]) == (1.0, 0.0, 0.0, 0.0)
    assert ("place in the word", "space") not in by_group  # the last token predicts nothing
    for masks in groups_of(analysed).values():  # every token is in one group of each question
        assert (np.sum(list(masks.values()), axis=0) == 1).all()
    assert by_group["router", None]["depth_and_gain"] == pytest.approx(1.0)
    tables = group_tables(records)
    assert tables[0].rows[0][:3] == ["whole word", "50.0%", "2.00"]  # the deepest first
    assert tables[0].rows[0][-3:] == ["+0.500", "100.0%", "0.0%"]
    several = group_tables([*records, *group_records("other", analysed)])
    assert several[0].columns[0] == "model"
    assert router_table(records).rows[0][0] == "m"


def test_fifths_of_a_sure_model_lose_no_token(analysed: Analysed) -> None:
    entropy = np.concatenate([np.linspace(0, 0.02, 40), np.linspace(0.02, 3, 20)])[None]
    sure = replace(analysed, routes=replace(analysed.routes, entropy=entropy))
    groups = groups_of(sure)["entropy of the next token"]
    assert sum(int(mask.sum()) for mask in groups.values()) == 60
    assert next(iter(groups)) == "0.0-0.0 nats"
    assert len(groups) < 5


def test_the_command_on_the_model_that_ships(tmp_path: Path) -> None:
    words = ["analyse", "prose", "--max-sequences", "4", "--seq-len", "64", "--json"]
    result = CliRunner().invoke(app, [*words, "--out", str(tmp_path)], catch_exceptions=False)
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    assert lines[0]["question"] == "router"
    depth: dict[str, Any] = {r.get("group", ""): r.get("mean_depth") for r in lines}
    assert depth["punctuation"] < depth["first part"]
    names = {path.name for path in tmp_path.iterdir()}
    assert {"tokens.jsonl", "report.md", "index.html", "scores.png", "word.png"} <= names
    page = (tmp_path / "index.html").read_text()
    assert page.count('<span class="t d') == 64
    assert ".r3 .d3{" in page
