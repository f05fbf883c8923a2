"""`mor eval` and `mor calibrate` as a user runs them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from mor.data import PackedDataset, prepare
from mor.eval import evaluate
from mor.hf.load import load_model
from tests.cli.done import Mor
from tests.tiny import SEQ_LEN

# Evaluation ------------------------------------------------------------------------------------


def test_eval(mor_: Mor, run: Path, data: Path, tmp_path: Path) -> None:
    done = mor_("eval", run, "--data", data, "--json", "--out", tmp_path / "eval.json")
    assert done.code == 0
    assert done.err == f"kept: {run / 'eval.json'}\n"
    found = json.loads(done.out)
    assert json.loads((tmp_path / "eval.json").read_text()) == found
    dataset = PackedDataset(data, "validation", SEQ_LEN)  # a run folder's own seq_len
    expected = evaluate(load_model(run), dataset)
    assert found["causal"] == expected["causal"]
    assert found["leaky"] == expected["leaky"]
    assert found["seq_len"] == SEQ_LEN
    assert found["command"].startswith("mor eval ")
    assert len(found["sample"]["tokens"]) == SEQ_LEN


def test_eval_table(mor_: Mor, run: Path, data: Path) -> None:
    done = mor_("eval", run, "--data", data, "--max-sequences", 2, "--seq-len", 8)
    assert done.code == 0
    for words in (
        "causal",
        "leaky top-k (looks ahead, not causal)",
        "at most 1 recursion",
        "causal minus leaky",
    ):
        assert words in done.out


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["nowhere", "--data", "DATA"], "model folder 'nowhere' does not exist"),
        (["DATA", "--data", "DATA"], "is no model folder"),
        (["RUN", "--data", "RUN"], "is not a prepared data folder"),
        (["RUN", "--data", "DATA", "--split", "test"], "has no split 'test'"),
        (["RUN", "--data", "DATA", "--seq-len", "99999"], "shorten seq_len"),
        (["RUN", "--data", "DATA", "--seq-len", "65"], "max_position_embeddings=64"),
        (["RUN", "--data", "DATA", "--out", "no/such/x.json"], "out=no/such/x.json"),
    ],
)
def test_evaluation_that_cannot_be(
    mor_: Mor, words: list[str], error: str, run: Path, data: Path
) -> None:
    places = {"RUN": run, "DATA": data}
    assert error in mor_("eval", *[places.get(word, word) for word in words]).error


def test_the_datas_tokenizer_is_the_models(
    mor_: Mor, run: Path, data: Path, tmp_path: Path
) -> None:
    """Of equal size, yet other words: the score would be of nonsense."""
    words = " ".join(f"{letter}{letter}q" for letter in "abcdefghijklmnopqrstuvwxyz" * 4)
    (tmp_path / "a.txt").write_text(words)
    (tmp_path / "b.txt").write_text(words[::-1])
    other = prepare(tmp_path, tmp_path / "data", vocab_size=300, validation_fraction=0.5)
    assert other.vocab_size == 300
    for command in (["eval"], ["calibrate", "--out", tmp_path / "out", "--split", "validation"]):
        done = mor_(*command, run, "--data", other.directory)
        assert "was prepared with another tokenizer" in done.error
        assert f"--tokenizer {run / 'model'}" in done.error
    assert not (tmp_path / "out").exists()
    # A checkpoint that came without a tokenizer is read by the data's.
    bare = Path(shutil.copytree(run / "model", tmp_path / "bare"))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (bare / name).unlink()
    found = json.loads(mor_("eval", bare, "--data", data, "--seq-len", 16, "--json").out)
    assert found["causal"] == json.loads(mor_("eval", run, "--data", data, "--json").out)["causal"]
    assert "holds no tokenizer" in mor_("generate", bare).error


def test_calibrate_by_confidence(mor_: Mor, run: Path, data: Path, tmp_path: Path) -> None:
    done = mor_("calibrate", run, "--confidence", 0.25, "--out", tmp_path / "sure")
    assert "surer than 0.25" in done.out
    boundary = load_model(tmp_path / "sure").model.router.boundary
    assert boundary.tolist() == pytest.approx([-1.0986123] * len(boundary))
    assert (tmp_path / "sure" / "tokenizer.json").is_file()
    for wrong in ([], ["--confidence", 1.5], ["--confidence", 0.2, "--data", data]):
        refused = mor_("calibrate", run, *wrong, "--out", tmp_path / "no")
        assert refused.code == 2, wrong
        assert "confidence" in refused.error
    assert not (tmp_path / "no").exists()


def test_calibrate(mor_: Mor, run: Path, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "served"
    done = mor_("calibrate", run, "--data", data, "--out", out, "--capacity", "1,0.5,0.25")
    assert done.code == 0
    assert "boundaries" in done.out
    model = load_model(out)
    assert model.config.router_capacities == [1, 0.5, 0.25]
    scored = json.loads(
        mor_("eval", out, "--data", data, "--split", "train", "--seq-len", SEQ_LEN, "--json").out
    )
    assert scored["causal"]["active_fraction"] == pytest.approx([1, 0.5, 0.25], abs=0.02)
    assert "nothing is overwritten" in mor_("calibrate", run, "--data", data, "--out", out).error
    words = ["calibrate", run, "--data", data, "--out", tmp_path / "new", "--seq-len", 65]
    assert "max_position_embeddings=64" in mor_(*words).error
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("capacity", ["1,0.25,0.5", "1,0.5", "nan,0.5,0.2", "2,1,1"])
def test_capacities_that_cannot_be(
    mor_: Mor, capacity: str, run: Path, data: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    done = mor_("calibrate", run, "--data", data, "--out", out, "--capacity", capacity)
    assert "router_capacities" in done.error
    assert not list(tmp_path.iterdir())
    assert mor_("calibrate", run, "--data", data, "--out", out, "--capacity", "1;2").code == 2
