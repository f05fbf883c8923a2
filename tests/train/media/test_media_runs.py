"""Runs on images and sounds: trained, resumed, scored, uptrained; what does not fit is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch.testing import assert_close
from transformers import AutoFeatureExtractor, AutoImageProcessor
from typer.testing import CliRunner

from mor.cli.app import app
from mor.data.media import MediaDataset
from mor.errors import MorError
from mor.eval import write_card
from mor.eval.calibrate import calibrate
from mor.eval.examples import evaluate_examples
from mor.hf.load import load_media_model, load_model
from mor.train import parse_recipe, train
from mor.train.classify.augment import augment
from mor.train.classify.data import MediaSamples, resolve_media
from mor.train.recipe.media import AugmentSection
from tests.media import CLASSES, make_folder, media_recipe, read_log

KINDS = ("images", "audio")
pytestmark = pytest.mark.filterwarnings("ignore:.*lr_scheduler.*")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("media")
    return {kind: make_folder(root / kind, kind) for kind in KINDS}


@pytest.fixture(scope="module")
def runs(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A trained run of each kind, with a checkpoint in its middle."""
    out = tmp_path_factory.mktemp("runs")
    return {kind: train(media_recipe(folders[kind], out, kind, keep_steps=[3])) for kind in KINDS}


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_learns_and_leaves_what_a_run_leaves(kind: str, runs: dict[str, Path]) -> None:
    log = read_log(runs[kind])
    losses = [entry["label_loss"] for entry in log if "label_loss" in entry]
    assert min(losses[3:]) < losses[0]
    assert 0 <= log[-1]["eval_accuracy"] <= 1
    assert all(0 <= entry["accuracy"] <= 1 for entry in log if "accuracy" in entry)
    summary = json.loads((runs[kind] / "summary.json").read_text("utf-8"))
    # Sixteen patches; sounds of 3 to 11 frames make about four tokens.
    assert summary["seq_len"] == (16 if kind == "images" else 4)
    assert summary["tokens"] == 6 * 8 * summary["seq_len"]
    assert summary["train_flops"] > 0
    model = load_media_model(runs[kind])
    assert list(model.config.id2label.values()) == list(CLASSES)
    assert not model.config.is_causal
    with pytest.raises(MorError, match="holds a MoRFor"):
        load_model(runs[kind])


@pytest.mark.parametrize("kind", KINDS)
def test_the_processor_beside_a_model_treats_inputs_as_training_did(
    kind: str, runs: dict[str, Path], folders: dict[str, Path]
) -> None:
    dataset = MediaDataset(folders[kind], "test")
    raw, item = dataset.raw(1), dataset[1]
    if kind == "images":
        made = AutoImageProcessor.from_pretrained(runs[kind] / "model")(
            raw.numpy(), return_tensors="pt"
        )
        assert_close(made["pixel_values"][0], item["pixel_values"], atol=1e-5, rtol=1e-5)
    else:
        made = AutoFeatureExtractor.from_pretrained(runs[kind] / "model")(
            raw.numpy(), return_tensors="pt"
        )
        assert_close(made["input_features"][0], item["input_features"])


def test_a_resumed_run_is_the_run(runs: dict[str, Path], folders: dict[str, Path]) -> None:
    run = runs["audio"]
    weights = load_media_model(run).state_dict()
    (run / "summary.json").rename(run / "kept.json")
    recipe = media_recipe(folders["audio"], run.parent, "audio", keep_steps=[3])
    train(recipe, resume_from="checkpoint-3")
    (run / "kept.json").unlink()
    for name, value in load_media_model(run).state_dict().items():
        assert torch.equal(value, weights[name]), name


@pytest.mark.parametrize("kind", KINDS)
def test_mor_eval_prints_both_rules(kind: str, runs: dict[str, Path]) -> None:
    done = CliRunner().invoke(app, ["eval", str(runs[kind]), "--split", "test", "--json"])
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout.splitlines()[0])
    assert result["rule"] == "topk"
    assert result["topk"]["accuracy"] == result["depth_cap"][-1]["accuracy"]
    assert result["causal"]["mean_depth"] <= 2
    assert result["depth_cap"][0]["mean_depth"] == 1
    assert result["depth_cap"][0]["flops_per_example"] < result["topk"]["flops_per_example"]
    assert result["random_routes"]["mean_depth"] == pytest.approx(result["topk"]["mean_depth"])
    assert result["train_flops"] > 0
    kept = json.loads((runs[kind] / "eval.json").read_text("utf-8"))
    assert kept["topk"] == result["topk"]
    card = write_card(runs[kind]).read_text("utf-8")
    assert f"pipeline_tag: {'image' if kind == 'images' else 'audio'}-classification" in card
    assert "each token by itself" in card


@pytest.mark.parametrize("kind", KINDS)
def test_boundaries_are_set_anew_from_a_sample(
    kind: str, runs: dict[str, Path], folders: dict[str, Path], tmp_path: Path
) -> None:
    out, data = tmp_path / "model", str(folders[kind])
    asked = ["calibrate", str(runs[kind]), "--data", data, "--split", "test", "--out", str(out)]
    done = CliRunner().invoke(app, [*asked, "--capacity", "1,0.25"])
    assert done.exit_code == 0, done.output
    dataset = MediaDataset(folders[kind], "test")
    found = evaluate_examples(load_media_model(out), dataset)["causal"]
    assert found["active_fraction"] == pytest.approx([1.0, 0.25], abs=1e-2)
    assert (out / "preprocessor_config.json").is_file()
    refused = CliRunner().invoke(app, [*asked[:-1], str(tmp_path / "more"), "--levels"])
    assert "--levels and --seq-len are of models of texts" in str(refused.exception)


def test_a_sample_for_boundaries_is_spread_over_the_split(
    runs: dict[str, Path], folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: set[int] = set()
    taken = MediaDataset.__getitem__

    def note(dataset: MediaDataset, place: int) -> Any:
        seen.add(place)
        return taken(dataset, place)

    monkeypatch.setattr(MediaDataset, "__getitem__", note)
    dataset = MediaDataset(folders["images"], "train")
    calibrate(load_media_model(runs["images"]), dataset, max_sequences=3, batch_size=2)
    assert len(dataset) > 3
    assert seen == {number * len(dataset) // 3 for number in range(3)}


@pytest.mark.parametrize("kind", KINDS)
def test_scores_do_not_depend_on_the_batch(
    kind: str, runs: dict[str, Path], folders: dict[str, Path]
) -> None:
    model, dataset = load_media_model(runs[kind]), MediaDataset(folders[kind], "test")
    one, many = (
        evaluate_examples(model, dataset, max_examples=7, batch_size=size) for size in (1, 5)
    )
    for name in ("accuracy", "nll", "mean_depth", "flops_per_example", "active_fraction"):
        for rule in ("causal", "topk"):
            assert one[rule][name] == pytest.approx(many[rule][name], rel=1e-4), name
        caps = one["depth_cap"][0][name], many["depth_cap"][0][name]
        assert caps[0] == pytest.approx(caps[1], rel=1e-4), name
    assert not model.training


@pytest.mark.parametrize("kind", KINDS)
def test_a_router_learns_what_depth_brings_on_a_frozen_trunk(
    kind: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    trunk = train(
        media_recipe(folders[kind], tmp_path, kind, {"router": "fixed"}, budget={"steps": 2})
    )
    fields: dict[str, Any] = {
        "name": "gain",
        "model": {"router": "threshold", "update_rule": "last"},
        "data": {"kind": kind, "path": str(folders[kind])},
        "train": {"budget": {"steps": 2}, "batch_size": 4, "report_to": [], "logging_steps": 1},
        "uptrain": {"start": str(trunk), "gain": {}},
        "output": str(tmp_path),
    }
    router = train(parse_recipe(fields))
    before, after = load_media_model(trunk).state_dict(), load_media_model(router).state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert not changed
    assert "gain/target_1" in read_log(router)[-2]
    fields |= {"name": "routes", "model": {}, "uptrain": {"start": str(router)}}
    fields["uptrain"]["freeze"] = ["routers"]
    fields["train"]["routing"] = "causal"
    routed = load_media_model(train(parse_recipe(fields))).state_dict()
    assert not torch.equal(
        routed["model.block.0.mlp.up_proj.weight"], after["model.block.0.mlp.up_proj.weight"]
    )
    assert torch.equal(routed["model.router.net.weight"], after["model.router.net.weight"])
    fields |= {"name": "teacher"}
    fields["uptrain"] = {"start": str(trunk), "distill": {"teacher": str(trunk)}}
    with pytest.raises(MorError, match=r"uptrain\.distill"):
        train(parse_recipe(fields))


def test_samples_are_functions_of_their_numbers(folders: dict[str, Path]) -> None:
    changes = AugmentSection(shift=1, flip=True, noise=0.1)
    dataset = MediaDataset(folders["images"], "train")
    samples = MediaSamples(dataset, per_step=5, seed=1, changes=changes).take(60)
    again = MediaSamples(dataset, per_step=5, seed=1, changes=changes).take(60)
    assert samples.epoch_length == 20
    for number in (37, 3, 21):
        assert torch.equal(samples[number]["pixel_values"], again[number]["pixel_values"])
    plain = MediaSamples(dataset, per_step=24, seed=1).take(48)
    for epoch in (0, 24):  # every example once
        seen = torch.stack([plain[epoch + place]["pixel_values"] for place in range(24)])
        every = torch.stack([dataset[place]["pixel_values"] for place in range(24)])
        assert_close(seen.sum((0, 1)), every.sum((0, 1)), rtol=1e-4, atol=1e-4)
    with pytest.raises(IndexError):
        samples[60]
    with pytest.raises(MorError, match="24 examples, fewer than the 25"):
        MediaSamples(dataset, per_step=25)


def test_changes_keep_shapes_and_labels() -> None:
    section = AugmentSection(shift=2, flip=True, noise=0.0, mask=0.5)
    pixels, label = torch.arange(48.0).view(1, 6, 8), torch.tensor(2)
    seen = set()
    for seed in range(8):
        draw = torch.Generator().manual_seed(seed)
        found = augment({"pixel_values": pixels, "labels": label}, section, draw)
        assert found["pixel_values"].shape == (1, 6, 8)
        assert found["labels"] is label
        assert set(found["pixel_values"].flatten().tolist()) <= set(pixels.flatten().tolist())
        seen.add(float(found["pixel_values"][0, 0, 0]))
        frames = torch.ones(1 + seed, 4)
        cut = augment({"input_features": frames, "labels": label}, section, draw)
        assert 1 <= len(cut["input_features"]) <= len(frames)
        assert bool(frames.all())  # the data set's own are as they were
    assert len(seen) > 2


@pytest.mark.parametrize(
    ("data", "model", "why"),
    [
        ({"kind": "audio"}, {}, "data.kind='audio', but .* holds 'images'"),
        ({"packing": "best_fit"}, {}, "packing='best_fit' is for texts"),
        ({"kind": "text"}, {}, "holds|no field|is_media|prepared"),
        ({}, {"patch_size": None}, "model.patch_size is missing"),
        ({}, {"patch_size": 3}, "must divide image_size=8"),
        ({}, {"image_size": 16}, "contradicts the data"),
        ({}, {"modality": "audio"}, "contradicts the data|num_mel_bins"),
        ({}, {"preset": "135m"}, "preset='135m' is of texts"),
        ({"augment": {"shift": -1}}, {}, r"data\.augment\.shift"),
        ({"augment": {"turn": 1}}, {}, "turn is not a field"),
    ],
)
def test_recipes_that_do_not_fit_are_refused(
    data: dict[str, Any], model: dict[str, Any], why: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    fields = media_recipe(folders["images"], tmp_path).model_dump(mode="json")
    fields["data"] |= data
    fields["model"] |= model
    fields["model"] = {name: value for name, value in fields["model"].items() if value is not None}
    with pytest.raises(MorError, match=why):
        train(parse_recipe(fields))


def test_a_recipe_says_its_length_once_the_data_is_known(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    recipe = resolve_media(media_recipe(folders["images"], tmp_path))
    assert recipe.data.seq_len == 16
    again = parse_recipe(yaml.safe_load(yaml.safe_dump(recipe.model_dump(mode="json"))))
    assert resolve_media(again) == recipe
    with pytest.raises(MorError, match="fsdp"):
        resolve_media(media_recipe(folders["images"], tmp_path, parallel="fsdp"))


def test_dry_run_plans_without_training(folders: dict[str, Path], tmp_path: Path) -> None:
    recipe = media_recipe(folders["audio"], tmp_path, "audio")
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe.model_dump(mode="json")), "utf-8")
    done = CliRunner().invoke(app, ["train", str(file), "--dry-run"])
    assert done.exit_code == 0, done.output
    assert "training FLOPs" in done.stdout
    refused = CliRunner().invoke(app, ["train", str(file), "--dry-run", "--measure"])
    assert refused.exit_code != 0
