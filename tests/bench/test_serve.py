from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mor.bench import check, serve
from mor.bench.records import Results
from mor.bench.serve import Settings, run_serve
from mor.bench.specs import parse_spec
from mor.bench.tables import COLUMNS, limit_lines, markdown, notes, rich_tables
from mor.bench.workload import Lengths, make_workload
from mor.errors import MorError
from mor.ops import native

SYSTEMS = ("vanilla", "mor3", "mor3:no_refill", "mor3:full_depth", "recursive2", "fake", "openvino")
LENGTHS = Lengths(mean=6.0, deviation=2.0)


def settings(systems: tuple[str, ...] = SYSTEMS, **fields: Any) -> Settings:
    workload = make_workload("paper", 5, 3, 320, LENGTHS)
    specs = tuple(parse_spec(name) for name in systems)
    return replace(Settings("tiny", specs, (workload,), rounds=2), **fields)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    out = tmp_path_factory.mktemp("bench") / "serve.jsonl"
    found = run_serve(settings(out=out))
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(lines) == len(found.rows) + 1  # and one for what was left out
    for line in lines:
        assert {"commit", "machine", "versions", "command", "load_average"} <= set(line)
    assert "openvino" in lines[-1]["left_out"]
    return found


def row(results: Results, name: str) -> dict[str, Any]:
    return next(row for row in results.rows if row["system"] == name)


def test_every_system_has_a_row_with_its_numbers(results: Results) -> None:
    assert [row["system"] for row in results.rows] == list(SYSTEMS[:-1])
    for one in results.rows:
        assert one["tokens_per_s_low"] <= one["tokens_per_s"] <= one["tokens_per_s_high"]
        assert one["rounds"] == 2
        assert one["bound"] > 0
        assert one["kv_bytes"] > 0
        assert one["reached"] == pytest.approx(one["tokens_per_s"] / one["bound"])
    assert set(results.left_out) == {"openvino"}


def test_depths_and_ratios(results: Results) -> None:
    assert row(results, "mor3")["forced_exits"]
    assert 1 < row(results, "mor3")["mean_depth"] < 3
    assert row(results, "mor3:no_refill")["mean_depth"] == row(results, "mor3")["mean_depth"]
    assert row(results, "mor3:full_depth")["mean_depth"] == 3
    assert row(results, "recursive2")["mean_depth"] == 2
    assert row(results, "mor3")["against"] == "vanilla"
    assert row(results, "mor3")["flops_ratio"] > 1
    assert row(results, "mor3:full_depth")["flops_ratio"] == pytest.approx(1, abs=0.02)
    assert row(results, "vanilla")["ratio"] == 1


def test_ours_are_checked_and_a_peer_that_differs_is_told(results: Results) -> None:
    by_name = {found.system: found for found in results.checks}
    for name in SYSTEMS[:5]:
        assert by_name[name].wrong == 0
        assert by_name[name].tokens > 0
    assert by_name["fake"].wrong == 3
    assert any("fake differs" in line for line in notes(results))
    assert any("Could not run: openvino: no environment" in line for line in notes(results))


def test_tables(results: Results) -> None:
    (table,) = rich_tables(results)
    assert table.row_count == len(COLUMNS) - 1
    header = {"commit": "c", "machine": "m", "versions": {"torch": "2"}, "command": "mor bench"}
    text = markdown(results, header, limit=10.0)
    assert text.count("\n| ") == len(results.rows) + 2  # header and rule
    assert "| mor3 * |" in text
    assert "`mor bench` at commit c, m; torch 2; average load" in text
    assert limit_lines(results, 1e-9)[2] == "- vanilla: none is"


def test_a_wrong_answer_of_ours_stops_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    right = check.references

    def wrong(*arguments: Any) -> list[list[int]]:
        # Never the best token: no tie of the two best explains it.
        return [[(token + 1) % 320 for token in row] for row in right(*arguments)]

    monkeypatch.setattr(check, "references", wrong)
    with pytest.raises(MorError, match=r"DIFFER .* nothing is timed"):
        run_serve(settings(("mor3",)))


def test_a_peer_that_dies_in_the_middle_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    measure = serve.measure

    def kill(*arguments: Any) -> Any:
        victims[0]._process.kill()
        return measure(*arguments)

    victims: list[Any] = []
    monkeypatch.setattr(serve, "measure", kill)
    monkeypatch.setattr(serve, "check_peer", collect(victims))
    found = run_serve(settings(("vanilla", "fake")))
    assert [row["system"] for row in found.rows] == ["vanilla"]
    assert "the worker died" in found.left_out["fake"]


def collect(into: list[Any]) -> Callable[..., check.Checked]:
    def noted(peer: Any, *arguments: Any) -> check.Checked:
        into.append(peer)
        return check.check_peer(peer, *arguments)

    return noted


def test_nothing_to_do_is_refused() -> None:
    with pytest.raises(MorError, match="at least one of each"):
        run_serve(settings(()))


def test_the_engine_that_is_warmed_is_the_one_that_is_timed() -> None:
    workload = make_workload("paper", 4, 2, 320, LENGTHS)
    system = serve.make_ours(parse_spec("mor3"), settings())
    short = check.sample_of(workload, 1, 2)
    assert short.output_tokens == 2
    system.run(short)
    warmed = system.engine_for(short)[1]
    assert system.engine_for(workload)[1] is warmed
    capped = make_workload("paper", 4, 3, 320, LENGTHS)
    assert system.engine_for(capped)[1] is not warmed


@pytest.mark.skipif(native.library() is None, reason="needs the kernels")
def test_weights_of_8_bits_are_compared_with_their_like() -> None:
    found = run_serve(settings(("vanilla", "vanilla:int8", "mor2:int8"), rounds=1))
    assert row(found, "mor2:int8")["against"] == "vanilla:int8"
    assert [one.wrong for one in found.checks] == [0, 0, 0]
    assert set(found.rates) == {"float32", "int8"}


def test_without_kernels_8_bits_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "library", lambda: None)
    found = run_serve(settings(("vanilla", "vanilla:int8"), rounds=1))
    assert [one["system"] for one in found.rows] == ["vanilla"]
    assert "no kernels" in found.left_out["vanilla:int8"]


def test_what_was_measured_before_an_interruption_is_kept(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    seen: list[str] = []

    def say(line: str) -> None:
        seen.append(line)
        if "round 2: vanilla" in line:
            raise KeyboardInterrupt

    found = run_serve(settings(("vanilla", "mor3"), out=tmp_path / "out.jsonl"), say)
    assert {one["system"]: one["rounds"] for one in found.rows} == {"vanilla": 2, "mor3": 1}
    assert len((tmp_path / "out.jsonl").read_text().splitlines()) == 2
    assert "interrupted" in seen[-2]
