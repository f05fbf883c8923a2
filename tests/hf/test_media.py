"""Images and sounds in Transformers' words: Auto classes, processors, pipelines, Trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close
from transformers import (
    AutoFeatureExtractor,
    AutoImageProcessor,
    AutoModel,
    AutoModelForAudioClassification,
    AutoModelForImageClassification,
    AutoModelForPreTraining,
    Speech2TextFeatureExtractor,
    Trainer,
    TrainingArguments,
    WhisperFeatureExtractor,
    pipeline,
)

import mor
from mor import ConfigError, MoRConfig
from mor.hf import MoRFeatureExtractor
from mor.hf.arguments import ArgumentError
from mor.hf.grey import MoRImageProcessor, make_grey
from mor.hf.next_frame import next_targets
from mor.hf.register import class_for
from mor.train import RouterCallback

NAMES = {0: "down", 1: "flat", 2: "up"}
OWN: dict[str, dict[str, Any]] = {
    "image": {"image_size": 8, "patch_size": 4, "num_channels": 1},
    "audio": {"num_mel_bins": 4},
}


def make(modality: str, **fields: Any) -> Any:
    torch.manual_seed(0)
    config = MoRConfig(
        modality=modality,
        id2label=NAMES,
        label2id={name: number for number, name in NAMES.items()},
        hidden_size=16,
        intermediate_size=24,
        num_attention_heads=2,
        num_recursions=2,
        num_recursion_layers=1,
        **{"router": "expert_choice"} | OWN[modality] | fields,
    )
    return class_for(config)(config).eval()


def test_an_image_model_saves_loads_and_answers_in_a_pipeline(tmp_path: Path) -> None:
    model = make("image")
    model.save_pretrained(tmp_path)
    MoRImageProcessor(
        size={"height": 8, "width": 8}, image_mean=[0.4], image_std=[0.2]
    ).save_pretrained(tmp_path)
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path)
    assert type(loaded) is mor.MoRForImageClassification
    assert len(loaded.model.block) == 1  # what is shared is there once
    pixels = torch.rand(2, 1, 8, 8)
    assert torch.equal(loaded(pixels).logits, model(pixels).logits)
    assert isinstance(AutoImageProcessor.from_pretrained(tmp_path), MoRImageProcessor)
    picture = Image.fromarray(np.arange(300, dtype=np.uint8).repeat(3).reshape(15, 20, 3))
    (best, *_) = pipeline("image-classification", model=str(tmp_path))(picture, top_k=3)
    with torch.no_grad():
        grey = MoRImageProcessor.from_pretrained(tmp_path)(picture, return_tensors="pt")
        scores = model(**grey).logits.softmax(-1)[0]
    assert best["label"] == NAMES[int(scores.argmax())]
    assert best["score"] == pytest.approx(float(scores.max()), rel=1e-5)
    hidden = AutoModel.from_pretrained(tmp_path)(pixel_values=pixels).last_hidden_state
    assert hidden.shape == (2, 4, 16)


def test_a_sound_model_saves_loads_and_answers_in_a_pipeline(tmp_path: Path) -> None:
    model = make("audio", num_mel_bins=20)
    model.save_pretrained(tmp_path)
    Speech2TextFeatureExtractor(feature_size=20, num_mel_bins=20).save_pretrained(tmp_path)
    loaded = AutoModelForAudioClassification.from_pretrained(tmp_path)
    assert type(loaded) is mor.MoRForAudioClassification
    wave = np.sin(np.arange(4000) / 9).astype(np.float32)
    found = pipeline("audio-classification", model=str(tmp_path))(wave)
    assert {one["label"] for one in found} == set(NAMES.values())
    frames = torch.randn(2, 9, 20)
    assert torch.equal(loaded(frames).logits, model(input_values=frames).logits)


def test_whispers_features_are_turned() -> None:
    model = make("audio", num_mel_bins=80, max_position_embeddings=64)
    extract = WhisperFeatureExtractor(feature_size=80)
    wave = np.sin(np.arange(16000) / 9).astype(np.float32)
    made = extract(
        wave, sampling_rate=16000, padding="longest", return_tensors="pt", truncation=False
    )
    features = made["input_features"]
    assert features.shape[1] == 80
    assert torch.equal(model(features).logits, model(features.transpose(1, 2)).logits)
    with pytest.raises(ValueError, match="max_position_embeddings=64"):
        model(torch.zeros(1, 80, 3000))


def test_given_coefficients_are_normalised_padded_and_masked(tmp_path: Path) -> None:
    MoRFeatureExtractor(2, mean=[1.0, 0.0], std=[2.0, 1.0]).save_pretrained(tmp_path)
    extract = AutoFeatureExtractor.from_pretrained(tmp_path)
    assert type(extract) is MoRFeatureExtractor
    batch = extract([np.ones((1, 2)), np.full((3, 2), 5.0)], return_tensors="pt")
    assert batch["attention_mask"].tolist() == [[1, 0, 0], [1, 1, 1]]
    assert batch["input_features"].tolist() == [[[0, 1], [0, 0], [0, 0]], [[2, 5]] * 3]
    one = extract(np.ones((1, 2)), return_tensors="pt")
    assert one["input_features"].tolist() == [[[0, 1]]]
    for wrong in (np.ones((3, 4)), [np.ones((0, 2))]):
        with pytest.raises(ValueError, match=r"\[T, 2\]"):
            extract(wrong)
    with pytest.raises(ValueError, match="mean has 1 numbers"):
        MoRFeatureExtractor(2, mean=[1.0])
    with pytest.raises(ValueError, match="frames holds no sound"):
        extract([])


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "P", "CMYK", "1", "I;16", "LA"])
def test_whatever_comes_is_made_grey(mode: str) -> None:
    white = Image.new("L", (3, 2), 255)
    picture = Image.new("I;16", (3, 2), 65535) if mode == "I;16" else white.convert(mode)
    grey = make_grey(picture)
    assert grey.shape == (2, 3, 1)
    assert_close(grey.astype(float), np.full((2, 3, 1), 255.0))


def test_what_is_transparent_is_white_and_arrays_are_understood() -> None:
    assert make_grey(Image.new("RGBA", (2, 2), (0, 0, 0, 0))).min() == 255
    colours = np.zeros((3, 5, 4), np.uint8)
    colours[1] = 100
    assert make_grey(colours).shape == (5, 4, 1)
    assert make_grey(colours).max() == make_grey(np.moveaxis(colours, 0, -1)).max() == 59
    assert make_grey(colours[0]).shape == (5, 4, 1)
    with pytest.raises(ValueError, match="1 or 3 colours"):
        make_grey(np.zeros((4, 5, 2)))


@pytest.mark.parametrize("modality", ["image", "audio"])
def test_transformers_trainer_learns_and_scores(modality: str, tmp_path: Path) -> None:
    model = make(modality)
    draw = torch.Generator().manual_seed(0)
    rows = []
    for place in range(12):
        label = place % 3
        if modality == "image":
            pixels = torch.randn(1, 8, 8, generator=draw) / 4
            pixels[:, 2 * label : 2 * label + 2] += 1
            rows.append({"pixel_values": pixels, "labels": label})
        else:
            frames = torch.randn(6, 4, generator=draw) / 4
            frames[:, label] += 1
            mask = torch.ones(6, dtype=torch.long)
            mask[4 + label % 2 :] = 0
            rows.append({"input_features": frames, "attention_mask": mask, "labels": label})
    options = TrainingArguments(
        str(tmp_path), num_train_epochs=5, per_device_train_batch_size=6, learning_rate=1e-2,
        report_to=[], save_strategy="no", disable_tqdm=True, use_cpu=True,
    )  # fmt: skip

    def accuracy(scored: Any) -> dict[str, float]:
        return {"accuracy": float((scored.predictions.argmax(-1) == scored.label_ids).mean())}

    trainer = Trainer(
        model, options, train_dataset=rows, eval_dataset=rows, compute_metrics=accuracy,
        callbacks=[RouterCallback()],
    )  # fmt: skip
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    after = trainer.evaluate()
    assert after["eval_loss"] < before
    assert after["eval_accuracy"] > 0.6


@pytest.mark.parametrize("modality", ["image", "audio"])
def test_losses_add_up(modality: str) -> None:
    model = make(modality, exit_loss_weights=[0.5]).train()
    inputs = torch.rand(3, 1, 8, 8) if modality == "image" else torch.rand(3, 7, 4)
    output = model(inputs, labels=torch.tensor([0, 2, 1]))
    wanted = output.label_loss + 0.001 * output.router_losses["aux_loss"]
    assert_close(output.loss, wanted + 0.5 * output.exit_losses[1])
    output.loss.backward()
    assert model.classifier.weight.grad.abs().sum() > 0
    single = model.eval()(inputs, max_depth=1)
    assert single.depths.max() == 1
    assert single.token_mask is None
    assert isinstance(model(inputs, return_dict=False), tuple)


def test_regression_predicts_what_comes_next(tmp_path: Path) -> None:
    image = make("image", head_type="regression", num_channels=2)
    image.save_pretrained(tmp_path)
    loaded = AutoModelForPreTraining.from_pretrained(tmp_path)
    assert type(loaded) is mor.MoRForNextFrame
    pixels = torch.arange(128.0).view(1, 2, 8, 8)
    targets, told = next_targets(image.model.embed_tokens, pixels, None)
    assert_close(targets[0, 1], pixels[0, :, 4:, :4].flatten())
    assert told.shape == (1, 3)
    output = loaded(pixels / 128)
    error = output.logits[:, :-1] - targets / 128
    assert_close(output.loss, error.square().mean())

    sound = make("audio", head_type="regression")  # a token steps by two frames
    frames = torch.arange(40.0).view(2, 5, 4)
    targets, told = next_targets(
        sound.model.embed_tokens, frames, torch.tensor([[1] * 5, [0, 0, 1, 1, 1]])
    )
    assert_close(targets[0], frames[0, 1:].reshape(2, 8))
    assert_close(targets[1, 0], frames[1, 3:].flatten())
    assert told.tolist() == [[1, 1], [1, 0]]
    assert float(sound(input_features=frames[:, :1]).loss.detach()) == 0  # nothing follows


def test_wrong_classes_and_arguments_are_refused() -> None:
    image, text = make("image").config, MoRConfig(num_recursion_layers=1)
    for kind, config in (
        (mor.MoRForCausalLM, image),
        (mor.MoRForSequenceClassification, image),
        (mor.MoRForAudioClassification, image),
        (mor.MoRForNextFrame, image),
        (mor.MoRForImageClassification, text),
    ):
        with pytest.raises(ConfigError, match=f"is not for {kind.__name__}"):
            kind(config)
    model = make("image")
    with pytest.raises(ValueError, match="needs pixel_values"):
        model()
    with pytest.raises(ArgumentError, match="did you mean 'pixel_values'"):
        model(pixel_value=torch.zeros(1, 1, 8, 8))
    with pytest.raises(ArgumentError, match="output_attentions"):
        model(torch.zeros(1, 1, 8, 8), output_attentions=True)
    nothing: dict[str, Any] = {"use_cache": False, "cache": None, "past_key_values": None}
    assert model(torch.zeros(1, 1, 8, 8), **nothing).logits.shape == (1, 3)
    for given in ({"use_cache": True}, {"position_ids": torch.zeros(1, 4)}):
        with pytest.raises(ArgumentError, match="it is for texts"):
            model(torch.zeros(1, 1, 8, 8), **given)
    with pytest.raises(ValueError, match="two names of one input"):
        make("audio")(torch.zeros(1, 2, 4), input_values=torch.zeros(1, 2, 4))


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"modality": "video"}, "modality='video'"),
        ({"modality": "image"}, "image_size=None"),
        ({"modality": "image", "image_size": 8}, "patch_size=None"),
        ({"modality": "image", "image_size": 8, "patch_size": 3}, "must divide image_size=8"),
        ({"modality": "image", "image_size": [8, 6], "patch_size": 4}, "must divide"),
        ({"modality": "image", "image_size": [8], "patch_size": 4}, "height, width"),
        ({"modality": "image", "image_size": 8.0, "patch_size": 4}, "number of pixels"),
        ({"modality": "image", "image_size": 8, "patch_size": 4, "num_channels": 0}, "num_chan"),
        ({"modality": "image", "image_size": 8, "patch_size": 4, "head_dim": 6}, "multiple of 4"),
        (
            {"modality": "image", "image_size": 64, "patch_size": 1},
            "max_position_embeddings=2048 is less than the 4096 patches",
        ),
        ({"modality": "audio"}, "num_mel_bins=None"),
        ({"modality": "audio", "num_mel_bins": 4, "conv_kernel": 3}, "conv_kernel=3"),
        ({"modality": "audio", "num_mel_bins": 4, "conv_kernel": [3, 3]}, "as many entries"),
        ({"modality": "audio", "num_mel_bins": 4, "conv_stride": [4]}, "steps over frames"),
        ({"modality": "audio", "num_mel_bins": 4, "head_type": "vocabulary"}, "'classes' or"),
        ({"head_type": "classes"}, "use 'vocabulary'"),
        ({"is_causal": False}, "is_causal=False"),
        ({"is_causal": 1}, "is_causal=1"),
        (
            {"modality": "audio", "num_mel_bins": 4, "head_type": "regression", "is_causal": False},
            "asks it to predict",
        ),
        ({"classifier_pooling": "max"}, "classifier_pooling='max'"),
        ({"image_sizes": 8}, "did you mean 'image_size'"),
    ],
)
def test_wrong_configurations_are_refused(fields: dict[str, Any], why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        MoRConfig(num_recursion_layers=1, **fields)
