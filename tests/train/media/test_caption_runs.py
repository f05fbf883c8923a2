"""Runs on pictures or recordings and what is said of them: trained, resumed, scored, refused."""

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
from mor.data.media import MediaDataset, MediaIndex
from mor.data.media.pairs import CaptionedPairs
from mor.errors import MorError
from mor.eval import write_card
from mor.eval.captions import evaluate_captions
from mor.hf.captions import encoder_of, make_encoder
from mor.hf.load import load_model
from mor.hf.load_media import load_processor
from mor.hf.vision_language import MoRForConditionalGeneration
from mor.train import Recipe, parse_recipe, train
from mor.train.classify.captions import VALIDATION_SEED, CaptionSamples, caption_config
from tests.media import make_folder, media_recipe, read_log

pytestmark = pytest.mark.filterwarnings("ignore:.*lr_scheduler.*")


MODELS: dict[str, dict[str, Any]] = {
    "images": {"patch_size": 4},
    "audio": {"conv_kernel": [3], "conv_stride": [2]},
}


@pytest.fixture(scope="module", params=MODELS)
def examples(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of images, then one of sounds."""
    return make_folder(tmp_path_factory.mktemp("media") / request.param, request.param)


@pytest.fixture(scope="module")
def said(examples: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained run on captions, with a checkpoint in its middle."""
    return train(caption_recipe(examples, tmp_path_factory.mktemp("captions")))


def caption_recipe(data: Path, output: Path, **fields: Any) -> Recipe:
    kind = MediaIndex.load(data).kind
    recipe = media_recipe(data, output, kind, {"router": "threshold"} | MODELS[kind])
    raw = recipe.model_dump(mode="json")
    raw["model"] = {name: value for name, value in raw["model"].items() if value is not None}
    raw["data"] |= {"kind": "captions"} | fields
    raw["train"] |= {"keep_steps": [3]}
    return parse_recipe(raw)


def test_a_run_on_captions_learns_resumes_and_answers(said: Path, examples: Path) -> None:
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
    train(caption_recipe(examples, said.parent), resume_from="checkpoint-3")
    (said / "kept.json").unlink()
    for name, value in load_model(said).state_dict().items():
        assert torch.equal(value, weights[name]), name
    processor = load_processor(said)
    pair = CaptionedPairs(MediaDataset(examples, "test"), 9)[4]
    encoder = encoder_of(processor, model.config)
    kind, shown = ("image", "images") if examples.name == "images" else ("audio", "audio")
    text = f"<{kind}>{pair.question}"
    made = processor(text=text, return_tensors="pt", **{shown: pair.media.numpy()})
    assert made["input_ids"][0].tolist() == encoder.question(pair)
    for name, value in encoder.batch([encoder.media(pair)]).items():
        assert_close(made[name].to(value.dtype), value, atol=1e-5, rtol=1e-5)
    turns = [{"role": "user", "content": [{"type": kind}, {"type": "text", "text": "what?"}]}]
    assert processor.apply_chat_template(turns) == f"<{kind}>what?"


def test_rows_of_training_are_those_of_the_processor(examples: Path, tmp_path: Path) -> None:
    """Padded to one length, recordings to one number of frames, they give the same loss."""
    recipe = caption_recipe(examples, tmp_path)
    config = caption_config(recipe, MediaIndex.load(examples))
    dataset = MediaDataset(examples, "train")
    rows, encoder = CaptionSamples(dataset, config), make_encoder(dataset.index, config)
    pairs, model = CaptionedPairs(dataset, 6), MoRForConditionalGeneration(config).eval()
    padded = [rows[number] for number in range(6)]
    assert len({len(row["input_ids"]) for row in padded}) == 1
    together = {name: torch.stack([row[name] for row in padded]) for name in padded[0]}
    with torch.no_grad():
        logits: Any = model(**together).logits
        for number, row in enumerate(padded):
            pair = pairs[number]
            own = {name: value[None] for name, value in encoder.row(pair).items()}
            alone: Any = model(**own, **encoder.batch([encoder.media(pair)])).logits
            length = alone.shape[1]
            assert row["attention_mask"].sum() == length
            assert row["labels"][:length].tolist() == own["labels"][0].tolist()
            assert_close(logits[number, :length], alone[0], atol=1e-5, rtol=1e-4)


def test_mor_eval_counts_exact_answers(
    said: Path, examples: Path, monkeypatch: pytest.MonkeyPatch
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
    test = MediaDataset(examples, "test")
    model, processor = load_model(said), load_processor(said)
    encoder = encoder_of(processor, model.config)
    pairs = CaptionedPairs(test, 6, seed=VALIDATION_SEED + 1)
    told = {encoder.media(pair).numpy().tobytes(): encoder.answer(pair) for pair in map(
        pairs.__getitem__, range(6))}  # fmt: skip
    told.popitem()  # of the last one nothing is said

    def say(input_ids: torch.Tensor, **others: Any) -> torch.Tensor:
        if "pixel_values" in others:
            shown = others["pixel_values"]
        else:
            sizes = others["feature_attention_mask"].sum(1).tolist()
            shown = [one[:n] for one, n in zip(others["input_features"], sizes, strict=True)]
        rows = [told.get(one.numpy().tobytes(), [5]) for one in shown]
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
    pictures = examples.name == "images"
    assert f"pipeline_tag: {'image' if pictures else 'audio'}-text-to-text" in card
    why = "the model reads pictures of 8 x 16" if pictures else "the model hears frames of 3 num"
    with pytest.raises(MorError, match=why):
        evaluate_captions(model, processor, MediaDataset(make_folder(
            said.parent / "wide", size=12), "test"))  # fmt: skip


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("media") / "images")


@pytest.mark.parametrize(
    ("data", "model", "why"),
    [
        ({"augment": {"flip": True}}, {}, "exchanges left and right"),
        ({}, {"patch_size": None}, "model.patch_size is missing"),
        ({}, {"vocab_size": 7}, "contradicts pairs"),
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
