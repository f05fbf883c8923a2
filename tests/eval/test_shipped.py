"""The models that ship: they load by name, answer new documents, are served as they generate."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from mor.data import PackedDataset, prepare
from mor.engine import Engine, SamplingParams
from mor.errors import MorError
from mor.eval.answers import score_answers
from mor.hf.load import load_model, load_tokenizer
from mor.run_files import find_folder, model_folder, shipped_models


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
    params = SamplingParams(temperature=0.0, max_tokens=1)
    served = Engine(model).generate(prompts, params)
    for prompt, output in zip(prompts, served, strict=True):
        with torch.inference_mode():
            alone = model.generate(torch.tensor([prompt]), max_new_tokens=1, do_sample=False)
        assert list(output.completions[0].token_ids) == alone[0, len(prompt) :].tolist()


def test_a_shipped_model_goes_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert shipped_models() == ["hops", "hops-dense"]
    assert model_folder(Path("hops")).name == "hops"
    assert len(load_tokenizer("hops")) == load_model("hops").config.vocab_size
    with pytest.raises(MorError, match="'hop' does not exist"):
        model_folder(Path("hop"))
    # A folder of that name comes first, and a path is never a name.
    monkeypatch.chdir(tmp_path)
    (tmp_path / "hops").mkdir()
    assert find_folder(Path("hops")) == Path("hops")
    assert find_folder(tmp_path / "hops-dense") == tmp_path / "hops-dense"
