"""The model card: every number is that of the run or of the evaluation, and nothing is invented."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM

from mor.data import DataIndex, PackedDataset
from mor.errors import MorError
from mor.eval import evaluate, write_card
from mor.hf.load import load_model
from mor.train import parse_recipe, train
from tests.tiny import SEQ_LEN, tiny_recipe


@pytest.fixture(scope="module", params=["expert_choice", "fixed"])
def run(
    request: pytest.FixtureRequest, data: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A finished run of two steps with its card."""
    output = tmp_path_factory.mktemp("runs")
    model = {"num_recursions": 1} if request.param == "fixed" else {}
    folder = train(tiny_recipe(data, output, request.param, model, budget={"steps": 2}))
    write_card(folder, max_sequences=3)
    return folder


@pytest.fixture
def card(run: Path) -> str:
    return (run / "model" / "README.md").read_text()


def row(card: str, name: str) -> list[str]:
    """The other cells of the one row that starts with ``name``."""
    found = [line for line in card.splitlines() if line.startswith(f"| {name} |")]
    assert len(found) == 1, name
    return [cell.strip() for cell in found[0].split("|")[2:-1]]


def test_scores_are_those_of_mor_eval(run: Path, card: str, data: Path) -> None:
    dataset = PackedDataset(data, "validation", SEQ_LEN)
    scores = evaluate(load_model(run), dataset, max_sequences=3)
    causal = row(card, "causal rule, as in generation")
    assert causal[0] == f"{scores['causal']['nll']:.4f}"
    assert causal[3] == f"{scores['causal']['mean_depth']:.2f}"
    leaky = "training's selection: **looks ahead, no measure of the model**"
    if scores["leaky"] is None:
        assert leaky not in card
        assert "at most" not in card
    else:
        assert row(card, leaky)[0] == f"{scores['leaky']['nll']:.4f}"
        for cap in scores["depth_cap"]:
            name = f"causal rule, at most {cap['max_depth']} of 3 recursions"
            assert row(card, name)[0] == f"{cap['nll']:.4f}"
    assert f"The first 3 sequences of 16 tokens of split `validation`, {3 * 15} targets" in card


def test_what_the_run_says(run: Path, card: str, data: Path) -> None:
    summary = json.loads((run / "summary.json").read_text())
    index = DataIndex.load(data)
    assert row(card, "unique parameters") == [f"{summary['parameters']:,}"]
    assert row(card, "tokens") == [f"{summary['tokens']:,}"]
    assert row(card, "training FLOPs, as planned") == [f"{summary['train_flops']:.4g}"]
    assert row(card, "hardware") == [summary["machine"]]
    assert row(card, "commit") == [f"`{summary['commit']}`"]
    assert row(card, "command") == [f"`{summary['command']}`"]
    assert f"torch {summary['versions']['torch']}" in row(card, "versions")[0]
    assert row(card, "made by") == [f"`{index.command}`"]
    assert row(card, "tokens of `train`") == [f"{index.num_tokens('train'):,}"]
    assert row(card, "folder") == [f"`{data}`"]


def test_the_recipe_in_it_runs_again(run: Path, card: str) -> None:
    block = re.search(r"```yaml\n(.*?)```", card, re.DOTALL)
    assert block
    again = parse_recipe(yaml.safe_load(block[1]))
    assert again == parse_recipe(yaml.safe_load((run / "recipe.yaml").read_text()))


def test_front_matter_for_the_hub(run: Path, card: str) -> None:
    found = ModelCard.load(run / "model" / "README.md").data.to_dict()
    assert found["library_name"] == "transformers"
    assert found["pipeline_tag"] == "text-generation"
    assert "license" not in found
    assert "language" not in found
    # A card beside the weights is in nobody's way.
    assert AutoModelForCausalLM.from_pretrained(run / "model").config.model_type == "mor"


def test_how_to_use_it_works(run: Path, card: str, monkeypatch: pytest.MonkeyPatch) -> None:
    block = re.search(r"```python\n(.*?)```", card, re.DOTALL)
    assert block
    monkeypatch.chdir(run / "model")
    exec(compile(block[1], "card", "exec"), {})


def test_a_run_that_is_not_finished(tmp_path: Path) -> None:
    with pytest.raises(MorError, match=r"is no finished run: summary\.json is missing"):
        write_card(tmp_path)
