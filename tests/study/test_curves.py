"""`mor curves`: the table, the plot, the page, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from mor.cli.app import app
from mor.cli.curves import distinct_name, parse_factors
from mor.errors import MorError
from mor.eval.elastic import Point
from mor.study.curves import curve_table, range_table, write_curves


def points(task: bool = False) -> list[Point]:
    exact = 0.5 if task else None
    return [
        Point("depth", 1, 1.0, (1.0, 0.0), 10.0, 20.0, 3.0, exact),
        Point("depth", 2, 1.5, (1.0, 0.5), 15.0, 25.0, 2.5, exact),
        Point("capacity", 0.5, 1.2, (1.0, 0.2), 12.0, 22.0, 2.505, exact),
        Point("capacity", 1.0, 1.5, (1.0, 0.5), 15.0, 25.0, 2.5, exact),
    ]


def test_one_checkpoint_beside_models_of_one_depth(tmp_path: Path) -> None:
    curves = {"a|b": points(), "vanilla": points()[:1]}
    page = write_curves(curves, tmp_path / "out")
    assert {path.name for path in page.parent.iterdir()} == {
        "curves.jsonl", "report.md", "curves.png", "index.html",
    }  # fmt: skip
    lines = [json.loads(line) for line in (page.parent / "curves.jsonl").read_text().splitlines()]
    assert [line["model"] for line in lines] == ["a|b"] * 4 + ["vanilla"]
    assert lines[2]["kind"] == "capacity"
    assert lines[2]["provenance"]
    table = curve_table(curves)
    assert table.rows[0][1:] == ["at most 1", "1.000", "10", "20", "3.0000", "+0.5000"]
    assert table.rows[2][1] == "capacity 0.5"
    assert range_table(curves).rows == [
        ["a|b", "caps on depth", "1.00x", "0.5000", "1.50x"],
        ["a|b", "capacities", "1.25x", "0.0050", "1.25x"],
    ]
    assert curve_table({"task": points(task=True)}).rows[0][-1] == "50.0%"
    assert "exact match" not in table.columns


def test_names_are_kept_apart() -> None:
    taken: dict[str, Any] = {}
    for path in ("runs/a", "other/a", "other/a", "runs/b/model"):
        taken[distinct_name(Path(path), taken)] = []
    assert list(taken) == ["a", "other/a", "other/a #2", "b"]


def test_capacities_as_text() -> None:
    assert parse_factors("1, 0.2,0.2") == [0.2, 1.0]
    assert parse_factors(" ") == []
    for wrong in ("a", "0.2,", "0", "nan", "inf", "-1"):
        with pytest.raises(MorError, match=r"capacities='.*' must look like 0\.2,0\.6,1"):
            parse_factors(wrong)


def test_the_command_on_the_model_that_ships() -> None:
    words = ["curves", "prose", "--max-sequences", "1", "--capacities", "0.5", "--json"]
    out = CliRunner().invoke(app, [*words, "--seq-len", "64"], catch_exceptions=False).stdout
    found = [json.loads(line) for line in out.splitlines()]
    assert [(line["kind"], line["value"]) for line in found] == [
        ("depth", 1), ("depth", 2), ("depth", 3), ("capacity", 0.5),
    ]  # fmt: skip
    assert found[3]["mean_depth"] < found[2]["mean_depth"]
    with pytest.raises(MorError, match=r"tolerance=-1\.0 must"):
        CliRunner().invoke(
            app, [*words, "--tolerance", "-1"], catch_exceptions=False, standalone_mode=False
        )
