"""A study's tables."""

from __future__ import annotations

from typing import Any

import pytest

from mor.study import plots
from mor.study.file import Study
from mor.study.plots import fit_optimum, isoflop_curves
from mor.study.runs import few_shot
from mor.study.tables import comparison, grid_tables, whole_budgets
from tests.study.studies import record


def test_differences_stand_beside_the_papers(study: Study) -> None:
    records = [
        record("vanilla", 2.0, paper={"nll": 2.78}),
        record("expert", 1.8, seed=0, paper={"nll": 2.75}, gap=0.001),
        record("expert", 2.0, seed=1, paper={"nll": 2.75}, gap=0.003),
    ]
    table = comparison(study, records)
    line = dict(zip(table.columns, table.rows[1], strict=True))
    assert line["causal NLL"] == "1.9000"
    assert line["± sd"] == "0.1414"
    assert line["causal - leaky"] == "+0.0020"
    assert line["NLL - vanilla"] == "-0.1000"
    assert line["paper's"] == "-0.0300"
    assert line["few-shot %"] == line["time"] == "-"


def test_whole_budgets_stand_against_whole_budgets(study: Study) -> None:
    records = [
        record("vanilla", 2.0),
        record("expert", 2.4),
        record("expert", 1.9, budget=1),
    ]
    table = comparison(study, records)
    lines = [dict(zip(table.columns, row, strict=True)) for row in table.rows]
    assert [line["NLL - vanilla"] for line in lines] == ["+0.0000", "-", "-0.1000"]
    assert whole_budgets([("vanilla", 0), ("expert", 0), ("expert", 1)]) == {
        "vanilla": 0,
        "expert": 1,
    }


def test_the_best_point_is_shown_and_every_point_listed(study: Study) -> None:
    field = "train.learning_rate"
    records = [
        record("expert", nll, point={field: rate}) for rate, nll in ((1e-2, 2.0), (1e-3, 1.5))
    ]
    assert comparison(study, records).rows[0][5] == "1.5000"
    (grid,) = grid_tables(study, records)
    assert grid.rows == [["0.001", "1.5000"], ["0.01", "2.0000"]]


def test_few_shot_is_the_mean_accuracy() -> None:
    scores = {"a": {"acc": 0.5, "acc_norm": 0.9}, "b": {"acc": 0.25}, "c": {"perplexity": 3.0}}
    assert few_shot(scores, list(scores)) == 37.5
    assert few_shot({}, []) is None
    assert few_shot(scores, ["a", "gone"]) is None
    # A group counts once, whatever its parts; the parts of ARC count as one.
    parts = {f"mmlu_{number}": {"acc": 0.1} for number in range(9)} | {"mmlu": {"acc": 0.1}}
    arc = {"arc_easy": {"acc": 0.6}, "arc_challenge": {"acc": 0.2}}
    asked = ["a", "mmlu", "arc_easy", "arc_challenge"]
    assert few_shot(scores | parts | arc, asked) == pytest.approx(100 * (0.5 + 0.1 + 0.4) / 3)


def test_curves_have_a_panel_for_each_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    records = [
        record(f"{family}-{size}-{budget}", 3.0, size)
        | {"family": family, "budget": budget, "summary": {
            "non_embedding_parameters": size, "train_flops": 2e12 * (budget + 1)}}
        for family in ("vanilla", "mor") for size in (30_000, 200_000) for budget in (0, 1)
    ]  # fmt: skip
    monkeypatch.setattr(plots, "to_png", lambda figure: figure)
    figure: Any = plots.draw_curves(records)
    first, second = figure.axes
    assert first.get_title(loc="left") == "2.00e12 FLOPs"
    assert second.get_title(loc="left") == "4.00e12 FLOPs"
    assert [label.get_text() for label in first.get_xticklabels()] == ["30K", "100K"]
    assert not first.get_xticklabels(minor=True)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["vanilla", "mor"]


def test_optimum_of_a_curve() -> None:
    size, nll = fit_optimum([1e5, 1e6, 1e7], [3.0, 2.5, 3.0]) or (0.0, 0.0)
    assert size == pytest.approx(1e6)
    assert nll == pytest.approx(2.5)
    assert fit_optimum([1e5, 1e6, 1e7], [3.0, 2.5, 2.2]) is None  # it lies outside
    assert fit_optimum([1e5, 1e6], [3.0, 2.5]) is None
    records = [record("a", 3.0, 10), record("b", 2.0, 20), record("c", 1.0, 30)]
    for one in records[:2]:
        one["family"] = "x"
    assert isoflop_curves(records) == {("x", 0): ([10, 20], [3.0, 2.0])}
