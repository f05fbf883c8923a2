"""Runs on pictures and what is said of them: trained, resumed, scored; misfits are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing import assert_close
from typer.testing import CliRunner

from mor.cli.app import app
from mor.cli.evaluate_media import caption_table
from mor.data.media import MediaDataset
from mor.data.media.pairs import CaptionedPairs
from mor.errors import MorError
from mor.eval import write_card
from mor.eval.captions import evaluate_captions
from mor.hf.captions import PairEncoder
from mor.hf.load import load_model
from mor.hf.load_media import load_processor
from mor.hf.vision_language import MoRForConditionalGeneration
from mor.train import Recipe, parse_recipe, train
from mor.train.classify.captions import VALIDATION_SEED
from tests.media import make_folder, media_recipe, read_log

pytestmark = pytest.mark.filterwarnings("ignore:.*lr_scheduler.*")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("media") / "images")


@pytest.fixture(scope="module")
def said(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained run on captions, with a checkpoint in its middle."""
    return train(caption_recipe(images, tmp_path_factory.mktemp("captions")))


def caption_recipe(data: Path, output: Path, **fields: Any) -> Recipe:
    recipe = media_recipe(data, output, "images", {"router": "threshold", "patch_size": 4})
    raw = recipe.model_dump(mode="json")
    raw["model"] = {name: value for name, value in raw["model"].items() if value is not None}
    raw["data"] |= {"kind": "captions"} | fields
    raw["train"] |= {"keep_steps": [3]}
    return parse_recipe(raw)


def test_a_run_on_captions_learns_resumes_and_answers(said: Path, images: Path) -> None:
    log = read_log(said)
    losses = [entry["lm_loss"] for entry in log if "lm_loss" in entry]
    assert losses[-1] < losses[0]
    assert log[-1]["eval_loss"] > 0
    summary = json.loads((said / "summary.json").read_text("utf-8"))
    assert 8 < summary["seq_len"] < 30
    model = load_model(said)
    assert isinstance(model, MoRForConditionalGeneration)
    weights = model.state_dict()
    (said / "summary.json").rename(said / "kept.json")
    train(caption_recipe(images, said.parent), resume_from="checkpoint-3")
    (said / "kept.json").unlink()
    for name, value in load_model(said).state_dict().items():
        assert torch.equal(value, weights[name]), name
    processor = load_processor(said)
    pair = CaptionedPairs(MediaDataset(images, "test"), 9)[4]
    encoder = PairEncoder.of(processor, model.config)
    made = processor(text="<image>" + pair.question, images=pair.pixels.numpy(),
                     return_tensors="pt")  # fmt: skip
    assert made["input_ids"][0].tolist() == encoder.question(pair)
    assert_close(made["pixel_values"][0], encoder.pixels(pair), atol=1e-5, rtol=1e-5)


def test_mor_eval_counts_exact_answers(
    said: Path, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = ["eval", str(said), "--split", "test", "--max-sequences", "4", "--json"]
    done = CliRunner().invoke(app, asked)
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout.splitlines()[0])
    assert (result["kind"], result["examples"]) == ("captions", 4)
    assert [row["max_depth"] for row in result["depth_cap"]] == [1, 2]
    assert result["depth_cap"][0]["mean_depth"] == 1
    assert result["causal"]["recursion_flops_per_example"] > 0
    assert "captions" in str(caption_table(result).columns[1].header)
    test = MediaDataset(images, "test")
    model, processor = load_model(said), load_processor(said)
    encoder = PairEncoder.of(processor, model.config)
    pairs = CaptionedPairs(test, 6, seed=VALIDATION_SEED + 1)
    told = {encoder.pixels(pair).numpy().tobytes(): encoder.answer(pair) for pair in map(
        pairs.__getitem__, range(6))}  # fmt: skip
    told.popitem()  # of the last one nothing is said

    def say(input_ids: torch.Tensor, pixel_values: torch.Tensor, **others: Any) -> torch.Tensor:
        rows = [told.get(one.numpy().tobytes(), [5]) for one in pixel_values]
        end, longest = encoder.end, max(map(len, rows))
        padded = [row + [end] * (longest - len(row)) for row in rows]
        return torch.cat([input_ids, torch.tensor(padded)], 1)

    monkeypatch.setattr(model, "generate", say)
    one, many = (
        evaluate_captions(model, processor, test, samples=6, batch_size=size)["causal"]
        for size in (1, 4)
    )
    assert one["accuracy"] == pytest.approx(5 / 6)
    assert one == pytest.approx(many, rel=1e-4)
    card = write_card(said, max_sequences=2).read_text("utf-8")
    assert "pipeline_tag: image-text-to-text" in card
    with pytest.raises(MorError, match="the model reads pictures of 8 x 16"):
        evaluate_captions(model, processor, MediaDataset(make_folder(
            said.parent / "wide", size=12), "test"))  # fmt: skip


@pytest.mark.parametrize(
    ("data", "model", "why"),
    [
        ({"augment": {"flip": True}}, {}, "exchanges left and right"),
        ({}, {"patch_size": None}, "model.patch_size is missing"),
        ({}, {"vocab_size": 7}, "contradicts the pictures"),
        ({}, {"max_position_embeddings": 10}, "the longest row"),
        ({"loss_on": "answers"}, {}, "loss_on='answers' is for texts"),
    ],
)
def test_captions_that_do_not_fit_are_refused(
    data: dict[str, Any], model: dict[str, Any], why: str, images: Path, tmp_path: Path
) -> None:
    fields = caption_recipe(images, tmp_path).model_dump(mode="json")
    fields["data"] |= data
    fields["model"] |= model
    fields["model"] = {name: value for name, value in fields["model"].items() if value is not None}
    with pytest.raises(MorError, match=why):
        train(parse_recipe(fields))
