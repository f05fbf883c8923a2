"""The tables say what the files say, and the words about depth stay true."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from mor.report import tables
from mor.report.records import load_run, load_runs

MakeRun = Callable[..., Path]


def caps(*nlls: float) -> dict[str, Any]:
    return {
        "depth_cap": [
            {"max_depth": depth, "nll": nll, "mean_depth": depth}
            for depth, nll in enumerate(nlls, start=1)
        ]
    }


def test_csv_holds_the_numbers_of_the_files(four_runs: list[Path]) -> None:
    rows = list(csv.DictReader(io.StringIO(tables.csv_table(load_runs(four_runs)))))
    assert len(rows) == 4
    for folder, row in zip(four_runs, rows, strict=True):
        summary = json.loads((folder / "summary.json").read_text())
        result = json.loads((folder / "eval.json").read_text())
        leaky = result.get("leaky")
        by_cap = {cap["max_depth"]: cap["nll"] for cap in result["depth_cap"]}
        want = {
            "unique parameters (M)": summary["parameters"] / 1e6,
            "tokens seen (M)": summary["tokens"] / 1e6,
            "training speed (tokens per s)": summary["tokens_per_s"],
            "peak memory (MiB)": 612,
            "causal NLL (nats per token)": result["causal"]["nll"],
            "leaky NLL, not causal: looks ahead (nats per token)": leaky and leaky["nll"],
            "NLL, depth cap 1 (nats per token)": by_cap.get(1),
            "NLL, depth cap 2 (nats per token)": by_cap.get(2),
            "NLL, depth cap 3 (nats per token)": by_cap.get(3),
            "mean depth (recursions per token)": result["causal"]["mean_depth"],
            "training FLOPs": summary["train_flops"],
        }
        assert row.pop("run") == summary["name"]
        assert {key: float(cell) if cell else None for key, cell in row.items()} == want


def test_markdown_shows_numbers_and_dashes(four_runs: list[Path]) -> None:
    lines = tables.markdown_table(load_runs(four_runs)).splitlines()
    assert len(lines) == 6
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert {len(row) for row in cells} == {12}
    by_run = {row[0]: dict(zip(cells[0], row, strict=True)) for row in cells[2:]}
    assert by_run["vanilla"]["unique parameters (M)"] == "3.51"
    assert by_run["vanilla"]["leaky NLL, not causal: looks ahead (nats per token)"] == "-"
    assert by_run["vanilla"]["NLL, depth cap 1 (nats per token)"] == "3.8500"
    assert by_run["vanilla"]["NLL, depth cap 3 (nats per token)"] == "-"
    assert by_run["mor-threshold"]["causal NLL (nats per token)"] == "3.8700"
    assert by_run["mor-threshold"]["training FLOPs"] == "3.21e+13"
    assert by_run["mor-threshold"]["training speed (tokens per s)"] == "13,457"


@pytest.mark.parametrize("width", [70, 100, 300])
def test_terminal_table_keeps_every_cell(four_runs: list[Path], width: int) -> None:
    runs = load_runs(four_runs)
    console = Console(width=width, file=io.StringIO(), color_system=None)
    console.print(tables.rich_table(runs, width=width))
    printed = console.file.getvalue()  # type: ignore[attr-defined]
    words = printed.split()
    for run in runs:
        for column in tables.columns(runs):
            assert column.text(run) in words
    assert max(map(len, printed.splitlines())) <= width
    assert "…" not in printed


def test_brackets_in_names_are_no_markup(make_run: MakeRun) -> None:
    runs = [load_run(make_run("odd", summary={"name": "[red]a|b[/red]"}))]
    console = Console(width=200, file=io.StringIO(), color_system=None)
    console.print(tables.rich_table(runs, width=200))
    assert "[red]a|b[/red]" in console.file.getvalue()  # type: ignore[attr-defined]
    assert "[red]a\\|b[/red]" in tables.markdown_table(runs)


@pytest.mark.parametrize(
    ("nlls", "gain", "words"),
    [
        (
            (4.0, 3.9, 3.88),
            0.12,
            "lowers the NLL by 0.1200 nats per token (perplexity falls by 11.31%)",
        ),
        ((3.9, 3.9, 3.9), 0.0, "depth buys nothing that 4 decimals show"),
        ((3.90001, 3.9, 3.9), 0.00001, "depth buys nothing that 4 decimals show"),
        (
            (3.88, 3.9, 4.0),
            -0.12,
            "raises the NLL by 0.1200 nats per token (perplexity rises by 12.75%)",
        ),
    ],
)
def test_what_depth_buys(
    make_run: MakeRun, nlls: tuple[float, ...], gain: float, words: str
) -> None:
    run = load_run(make_run("mor", evaluation=caps(*nlls)))
    assert tables.depth_gain(run) == pytest.approx(gain, abs=1e-9)
    assert words in tables.depth_sentence(run)
    assert f"NLL {nlls[0]:.4f} at depth cap 1, {nlls[-1]:.4f} at 3" in tables.depth_sentence(run)


def test_what_depth_buys_where_nothing_was_measured(make_run: MakeRun) -> None:
    assert "not scored at depth caps 1 and 3" in tables.depth_sentence(
        load_run(make_run("uncapped", evaluation=caps(4.0)))
    )
    nan = load_run(make_run("diverged", evaluation=caps(4.0, 3.9, float("nan"))))
    assert "nothing can be said" in tables.depth_sentence(nan)
    vanilla = make_run("vanilla", family="vanilla", router="none", num_recursions=1)
    assert "no depth to cap" in tables.depth_sentence(load_run(vanilla))


def test_notes_warn_of_unequal_conditions(make_run: MakeRun) -> None:
    same = load_runs([make_run("a"), make_run("b")])
    assert not any("do not compare" in note or "equal" in note for note in tables.notes(same))
    other = make_run(
        "c",
        summary={"train_flops": 6.42e13, "machine": "another"},
        evaluation={"split": "test"},
    )
    said = " ".join(tables.notes([*same, load_run(other)]))
    assert "factor of 2.00" in said
    assert "not all scored on the same tokens" in said
    assert "different machines" in said
