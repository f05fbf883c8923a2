"""The models that ship: they load by name, answer new documents, are served as they generate."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from mor.cli.app import app
from mor.data import PackedDataset, prepare
from mor.engine import Engine, SamplingParams
from mor.errors import MorError
from mor.eval import evaluate
from mor.eval.answers import score_answers
from mor.folder.tokenizer import load_tokenizer
from mor.hf.load import load_model
from mor.run_files import DEFAULT_MODEL, HELD_OUT, find_folder, model_folder, shipped_models


@pytest.fixture(scope="module")
def documents(tmp_path_factory: pytest.TempPathFactory) -> PackedDataset:
    """Documents of another seed than the recipes'."""
    folder = tmp_path_factory.mktemp("hops") / "data"
    prepare("task:hops:documents=400,seed=7", folder, validation_fraction=0.6)
    return PackedDataset(folder, "validation", 25, loss_on="answers")


def test_the_routed_model_answers_with_half_of_the_passes(documents: PackedDataset) -> None:
    result: dict[str, Any] = score_answers(load_model("hops"), documents)
    causal, first = result["causal"], result["depth_cap"][0]
    assert result["queries"] > 1_500
    assert causal["exact_match"] >= 0.975
    assert causal["mean_depth"] <= 0.55 * 4
    assert causal["exact_match"] - first["exact_match"] > 0.3  # depth is worth something
    assert causal["exact_match"] - result["random_routes"]["exact_match"] > 0.04  # routes too
    assert causal["depth_by_level"][3] > causal["depth_by_level"][1] + 1


def test_one_layer_runs_as_often_as_a_query_asks_for_steps(tmp_path: Path) -> None:
    prepare("task:hops:symbols=12,graph=cycle,documents=300,seed=11", tmp_path / "data",
            validation_fraction=0.6)  # fmt: skip
    documents = PackedDataset(tmp_path / "data", "validation", 29, loss_on="answers")
    result: dict[str, Any] = score_answers(load_model("steps"), documents)
    causal = result["causal"]
    assert causal["exact_match"] >= 0.93
    assert causal["mean_depth"] <= 0.45 * 8
    assert result["depth_cap"][2]["exact_match"] < 0.45  # three passes are too few
    assert result["random_routes"]["exact_match"] < 0.75
    assert causal["rank_correlation"] > 0.85
    assert causal["depth_by_level"][8] > causal["depth_by_level"][2] + 4


def test_a_cell_takes_as_many_passes_as_there_are_formulas_under_it(tmp_path: Path) -> None:
    prepare("task:formulas:documents=300,seed=11", tmp_path / "data", validation_fraction=0.6)
    documents = PackedDataset(tmp_path / "data", "validation", 25, loss_on="answers")
    model = load_model("formulas")
    result: dict[str, Any] = score_answers(model, documents)
    causal = result["causal"]
    assert causal["exact_match"] >= 0.99
    assert causal["mean_depth"] <= 0.25 * 8
    assert causal["rank_correlation"] > 0.9
    assert causal["level_rank_correlation"] == pytest.approx(1.0)
    assert result["random_routes"]["exact_match"] < 0.8
    for cap in range(2, 7):  # each pass reaches the formulas of one level more
        by_level = result["depth_cap"][cap - 1]["by_level"]
        assert by_level[cap + 1] > 0.98
        assert by_level[min(cap + 2, 8)] < 0.7
    control = load_model("formulas-three")
    weights = [sum(p.numel() for p in one.parameters()) for one in (model, control)]
    assert abs(weights[0] - weights[1]) < 0.01 * weights[0]
    fixed = score_answers(control, documents)["causal"]
    assert fixed["mean_depth"] > causal["mean_depth"] + 1
    assert fixed["exact_match"] < 0.97
    assert fixed["by_level"][7] < 0.7
    # Served: each cell's value asked for on its own, in one batch, as generate answers it.
    ids = documents[0]["input_ids"][:24].tolist()
    check_served(model, [ids[:place] for place in range(5, 25)])


def test_the_dense_twin_of_equal_weights_does_not(documents: PackedDataset) -> None:
    dense, routed = load_model("hops-dense"), load_model("hops")
    weights = [sum(p.numel() for p in model.parameters()) for model in (dense, routed)]
    assert abs(weights[0] - weights[1]) < 0.01 * weights[0]
    assert score_answers(dense, documents)["causal"]["exact_match"] <= 0.93


def test_the_engine_answers_as_generate_does(documents: PackedDataset) -> None:
    model = load_model("hops")
    task = documents.index.task
    assert task is not None
    prompts = []
    for row in range(12):
        ids = documents[row]["input_ids"]
        places = task.is_query(ids.numpy()).nonzero()[0]
        prompts.append(ids[: int(places[row % len(places)]) + 1].tolist())
    check_served(model, prompts)


def check_served(model: Any, prompts: list[list[int]]) -> None:
    """One batch of the engine writes the token that ``generate`` writes for each prompt alone."""
    params = SamplingParams(temperature=0.0, max_tokens=1)
    served = Engine(model).generate(prompts, params)
    for prompt, output in zip(prompts, served, strict=True):
        with torch.inference_mode():
            alone = model.generate(torch.tensor([prompt]), max_new_tokens=1, do_sample=False)
        assert list(output.completions[0].token_ids) == alone[0, len(prompt) :].tolist()


def test_a_shipped_model_goes_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["formulas", "formulas-three", "hops", "hops-dense", "prose", "steps"]
    assert shipped_models() == names
    assert model_folder(Path("hops")).name == "hops"
    assert len(load_tokenizer("hops")) == load_model("hops").config.vocab_size
    with pytest.raises(MorError, match="'hop' does not exist"):
        model_folder(Path("hop"))
    # A folder of that name comes first, and a path is never a name.
    monkeypatch.chdir(tmp_path)
    (tmp_path / "hops").mkdir()
    assert find_folder(Path("hops")) == Path("hops")
    assert find_folder(tmp_path / "hops-dense") == tmp_path / "hops-dense"


# The text model ---------------------------------------------------------------------------------


def test_depth_and_routes_are_worth_something_on_held_out_text() -> None:
    model, held_out = load_model(DEFAULT_MODEL), find_folder(DEFAULT_MODEL) / HELD_OUT
    found = evaluate(model, PackedDataset(held_out, "validation", 256), max_sequences=16)
    nll, caps = found["causal"]["nll"], [cap["nll"] for cap in found["depth_cap"]]
    assert nll < 4.3
    assert found["causal"]["mean_depth"] < 2.2
    assert caps[0] - nll > 0.05
    assert found["random_routes_nll"] - nll > 0.02


def test_commands_take_it_where_no_model_is_named() -> None:
    arguments = ["generate", "--prompt", "It was", "--max-new-tokens", "3", "--greedy", "--json"]
    told = CliRunner().invoke(app, arguments)
    assert told.exit_code == 0, told.output
    named = CliRunner().invoke(app, ["generate", "prose", *arguments[1:]])
    assert json.loads(told.stdout)["token_ids"] == json.loads(named.stdout)["token_ids"]
    scored = CliRunner().invoke(app, ["eval", "--max-sequences", "1", "--seq-len", "32", "--json"])
    assert scored.exit_code == 0, scored.output
    assert json.loads(scored.stdout)["data"] == "texts"
    refused = CliRunner().invoke(app, ["eval", "hops"])
    assert refused.exit_code != 0  # it has no text of its own
    assert "data is missing" in str(refused.exception)


def test_what_ships_is_small_and_says_where_it_came_from() -> None:
    root = find_folder(DEFAULT_MODEL).parent
    assert sum(path.stat().st_size for path in root.rglob("*") if path.is_file()) < 20e6
    for name in shipped_models():
        card = (root / name / "README.md").read_text("utf-8")
        assert "## Licence, use and limits" in card
        assert "mor data prepare" in card
