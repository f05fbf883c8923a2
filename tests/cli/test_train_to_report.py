"""From train to report by the plain commands, and cards of models that no run of ours trained."""

from __future__ import annotations

import inspect
import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from mor.cli.app import app
from mor.cli.bench import serve as bench_serve
from mor.errors import MorError
from mor.eval.keep import keep_result, run_of
from mor.report import find_runs
from tests.strategies import make_model, small_config
from tests.tiny import tiny_fields

ROOT = Path(__file__).resolve().parents[2]


def mor(*words: Any) -> Any:
    """A command, as typed; it has to work."""
    done = CliRunner().invoke(app, list(map(str, words)), catch_exceptions=True)
    assert done.exit_code == 0, (done.output, done.exception)
    return done


def fault(*words: Any) -> str:
    done = CliRunner().invoke(app, list(map(str, words)))
    assert isinstance(done.exception, MorError), (done.output, done.exception)
    return str(done.exception)


@pytest.fixture(scope="module")
def runs(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run of two steps, and what else lies about under ``runs``."""
    root = tmp_path_factory.mktemp("home") / "runs"
    fields = tiny_fields(data, root, "threshold")
    fields["train"] |= {"budget": {"steps": 2}}
    recipe = root.parent / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(fields))
    mor("train", recipe)
    shutil.copytree(root / "tiny", root / "demo" / "twin")
    (root / "corpus").mkdir()
    (root / "unfinished" / "checkpoints").mkdir(parents=True)
    (root / "notes.txt").write_text("not a run")
    return root


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # matplotlib's own
def test_train_eval_report(runs: Path, data: Path, tmp_path: Path) -> None:
    done = mor("eval", runs / "tiny", "--data", data)
    kept = runs / "tiny" / "eval.json"
    assert f"kept: {kept}" in done.stderr
    nll = json.loads(kept.read_text())["causal"]["nll"]
    assert kept.stat().st_mode & 0o777 == (runs / "tiny" / "log.jsonl").stat().st_mode & 0o777
    done = mor("report", *sorted(runs.iterdir()), "--out", tmp_path / "report")
    for said in (
        f"skipped: {runs / 'corpus'} is no run folder (summary.json is missing)",
        f"skipped: {runs / 'unfinished'} is a run that is not finished (summary.json is missing)",
        f"skipped: {runs / 'notes.txt'} is a file, no run folder",
        f"{runs / 'demo'} holds runs: twin",
        "not evaluated: tiny; mor eval RUN",  # the copy, first in order
    ):
        assert said in done.stderr
    rows = (tmp_path / "report" / "table.md").read_text().splitlines()
    assert any(f"{nll:.4f}" in row for row in rows if row.startswith("| tiny"))


def test_runs_are_found_once_and_mistakes_are_errors(runs: Path) -> None:
    found, _ = find_runs([runs / "demo", runs / "demo" / "twin", runs / "tiny", runs])
    assert found == [runs / "demo" / "twin", runs / "tiny"]
    with pytest.raises(MorError, match=r"nowhere is not a folder"):
        find_runs([runs / "nowhere"])
    found, said = find_runs([runs / "nowhere", runs / "tiny"])
    assert (found, len(said)) == ([runs / "tiny"], 1)
    assert said[0].endswith("nowhere is not a folder, and not there at all")
    with pytest.raises(MorError, match=r"no finished run: skipped: .*corpus is no run folder"):
        find_runs([runs / "corpus"])


def test_what_a_run_keeps(runs: Path, data: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(runs / "demo" / "twin", tmp_path / "run"))
    done = mor("eval", run / "model", "--data", data, "--json", "--out", tmp_path / "x.json")
    whole = json.loads(done.stdout)  # nothing else there
    assert json.loads((run / "eval.json").read_text()) == whole
    assert json.loads((tmp_path / "x.json").read_text()) == whole
    # A quick look does not cost the long evaluation; nor does another split.
    assert "not kept" in mor("eval", run, "--data", data, "--max-sequences", 1).stderr
    assert "held out" in str(keep_result(run, whole | {"split": "train"}))
    assert json.loads((run / "eval.json").read_text()) == whole
    # Other texts do replace it, and so does anything where the model is newer, or nothing readable.
    assert str(keep_result(run, whole | {"data": "others", "tokens": 1})).startswith("kept")
    (run / "eval.json").write_text("[")
    assert str(keep_result(run, whole)).startswith("kept")
    shutil.copytree(run / "model", tmp_path / "model")
    assert run_of(tmp_path / "model") is None
    assert keep_result(tmp_path / "model", whole) is None


def test_cards_of_models_that_no_run_trained(runs: Path, data: Path, tmp_path: Path) -> None:
    at, folded, vanilla = tmp_path / "at", tmp_path / "folded", tmp_path / "vanilla"
    mor("calibrate", runs / "tiny", "--data", data, "--out", at, "--levels", "--max-sequences", 4)
    mor("card", at, "--data", data, "--max-sequences", 1)
    card = (at / "README.md").read_text()
    assert "router:threshold" in card
    assert "The first 1 sequences" in card
    assert "| 0.25 | 1, " in card
    mor("card", at)  # ours may be written again
    assert "Not evaluated" in (at / "README.md").read_text()
    make_model(small_config("fixed", num_recursions=1, num_recursion_layers=4)).save_pretrained(
        vanilla
    )
    mor("card", vanilla)
    assert "A vanilla Transformer" in (vanilla / "README.md").read_text()
    mor("fold", vanilla, "--num-recursions", 2, "--sharing", "cycle", "--out", folded)
    mor("card", folded)
    card = (folded / "README.md").read_text()
    assert "| source |" in card
    assert "2 passes for every token" in card
    (folded / "README.md").write_text("# My own words\n")
    assert "nothing is overwritten" in fault("card", folded)
    assert "ships with mor" in fault("card", "hops")
    assert "no model folder" in fault("card", runs / "corpus")


def test_the_demo_looks_for_its_packages_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("matplotlib", "PIL"):
        with monkeypatch.context() as without:
            without.setitem(sys.modules, name, None)
            assert "pip install -e '.[report]'" in fault("demo", "--out", tmp_path / "demo")
    assert list(tmp_path.iterdir()) == []


def test_no_bench_writes_into_the_tracked_results_unless_told() -> None:
    default = inspect.signature(bench_serve).parameters["out"].default
    assert default == Path("runs/bench/serve.jsonl")
    scripts = [path for path in (ROOT / "benchmarks").rglob("*.py")]
    for path in scripts:
        text = path.read_text("utf-8")
        assert not re.search(r"(?:OUT|default)\s*=.*benchmarks/results", text), path
        assert not re.search(r"RESULTS\.open\(\"a\"", text), path
