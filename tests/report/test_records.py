"""Run folders are read whole, or refused with a message that names the place."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest

from mor.config.choices import RouterType
from mor.errors import MorError
from mor.report.records import load_run, load_runs, read_log

MakeRun = Callable[..., Path]


def test_values_arrive_unchanged(make_run: MakeRun) -> None:
    folder = make_run("mor-threshold")
    run = load_run(folder)
    summary = json.loads((folder / "summary.json").read_text())
    evaluation = json.loads((folder / "eval.json").read_text())
    assert run.label == "mor-threshold"
    assert {key: getattr(run.summary, key) for key in summary} == summary
    assert run.eval is not None
    assert run.eval.causal.nll == evaluation["causal"]["nll"]
    assert run.eval.sample is not None
    assert run.eval.sample.tokens == evaluation["sample"]["tokens"]
    assert [run.nll_at_cap(cap) for cap in (1, 2, 3, 4)] == [
        *(cap["nll"] for cap in evaluation["depth_cap"]),
        None,
    ]
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert run.log == lines
    assert run.series("eval_nll") == (
        [line["tokens"] for line in lines if "eval_nll" in line],
        [line["eval_nll"] for line in lines if "eval_nll" in line],
    )
    assert run.depths_of("router/boundary") == [1, 2]


def test_only_summary_is_required(make_run: MakeRun) -> None:
    folder = make_run("bare")
    (folder / "log.jsonl").unlink()
    (folder / "eval.json").unlink()
    keep = ("name", "family", "router", "num_recursions", "parameters")
    summary = json.loads((folder / "summary.json").read_text())
    (folder / "summary.json").write_text(json.dumps({key: summary[key] for key in keep}))
    run = load_run(folder)
    assert run.log == []
    assert run.eval is None
    assert run.summary.train_flops is None


@pytest.mark.parametrize("router", get_args(RouterType))
def test_every_router_can_be_reported(make_run: MakeRun, router: str) -> None:
    assert load_run(make_run("run", summary={"router": router})).summary.router == router


def test_equal_names_become_distinct(make_run: MakeRun) -> None:
    runs = load_runs([make_run(f"run{seed}", summary={"name": "mor"}) for seed in range(3)])
    assert [run.label for run in runs] == ["mor", "mor #2", "mor #3"]


def test_truncated_last_line_is_left_out(make_run: MakeRun) -> None:
    log = make_run("killed", rows=5) / "log.jsonl"
    whole = log.read_bytes()
    log.write_bytes(whole[:-30])
    assert [row["step"] for row in read_log(log)] == [10, 20, 30, 40]


def test_broken_line_elsewhere_is_named(make_run: MakeRun) -> None:
    log = make_run("broken", rows=5) / "log.jsonl"
    lines = log.read_text().splitlines()
    lines[2] = lines[2][:-30]
    log.write_text("\n".join(lines) + "\n")
    with pytest.raises(MorError, match=r"log\.jsonl, line 3: not JSON"):
        read_log(log)


@pytest.mark.parametrize("line", ["[1]", '{"loss": 1}', '{"step": "x"}', '{"step": true}', "3"])
def test_line_of_another_shape_is_named(tmp_path: Path, line: str) -> None:
    (tmp_path / "log.jsonl").write_text('{"step": 1}\n' + line + "\n")
    with pytest.raises(MorError, match=r'line 2: found .*integer "step"'):
        read_log(tmp_path / "log.jsonl")


def test_resumed_run_replaces_what_it_repeats(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"step": 1, "loss": 9.0},
        {"step": 2, "loss": 8.0},
        {"step": 2, "eval_nll": 8.5},
        {"step": 3, "loss": 7.0},
        {"step": 2, "loss": 7.9},
        {"step": 4, "loss": None, "note": "text"},
    ]
    path = tmp_path / "log.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    assert read_log(path) == [
        {"step": 1, "loss": 9.0},
        {"step": 2, "loss": 7.9, "eval_nll": 8.5},
        {"step": 4},
    ]


def test_diverged_score_is_nan_not_missing(make_run: MakeRun) -> None:
    folder = make_run("diverged")
    body = json.loads((folder / "eval.json").read_text())
    body["causal"]["nll"] = None
    (folder / "eval.json").write_text(json.dumps(body))
    result = load_run(folder).eval
    assert result is not None
    assert math.isnan(result.causal.nll)


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("summary.json", {"num_recursions": "three"}, r"num_recursions: found 'three'; .*integer"),
        ("summary.json", {"num_recursions": 0}, r"num_recursions: found 0; .*1"),
        ("summary.json", {"family": "moe"}, r"family: found 'moe'; .*'vanilla', 'recursive'"),
        ("summary.json", {"parameters": None}, r"parameters: found nothing"),
        ("eval.json", {"causal": None}, r"causal: found nothing"),
        ("eval.json", {"causal": {"nll": "low"}}, r"causal\.nll: found 'low'"),
        ("eval.json", {"sample": {"tokens": ["a"], "depths": []}}, r"0 depths for 1 tokens"),
        (
            "eval.json",
            {"sample": {"tokens": ["a"], "depths": [1], "nll": [1.0, 2.0]}},
            r"2 nll values for 1 tokens",
        ),
        (
            "eval.json",
            {"sample": {"tokens": ["a", "b"], "depths": [1, 4]}},
            r"sample\.depths\[1\] is 4; 0 to 3",
        ),
    ],
)
def test_wrong_field_is_named(
    make_run: MakeRun, file: str, change: dict[str, Any], message: str
) -> None:
    which = "summary" if file == "summary.json" else "evaluation"
    folder = make_run("wrong", **{which: change})
    with pytest.raises(MorError, match=message) as caught:
        load_run(folder)
    assert str(folder / file) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_or_foreign_files_are_named(tmp_path: Path, make_run: MakeRun) -> None:
    with pytest.raises(MorError, match="nowhere is not a folder"):
        load_run(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(MorError, match=r"summary\.json is missing"):
        load_run(tmp_path / "empty")
    folder = make_run("half")
    (folder / "eval.json").write_text('{"causal": {')
    with pytest.raises(MorError, match=r"eval\.json: not JSON"):
        load_run(folder)
    (folder / "eval.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(MorError, match=r"eval\.json: not JSON"):
        load_run(folder)
    (folder / "summary.json").write_text("[]")
    with pytest.raises(MorError, match=r"summary\.json: the whole file: found \[\]"):
        load_run(folder)
    with pytest.raises(MorError, match="run_dirs is empty"):
        load_runs([])
