"""``MoRForConditionalGeneration`` that hears: sounds at their places, saved, through every way."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoProcessor

from mor import ConfigError, MoRForConditionalGeneration
from mor.engine import EmbeddedPrompt, Engine
from mor.hf import MoRAudioProcessor
from mor.hf.load import load_model
from mor.hf.load_media import load_processor
from tests.engine.oracle import greedy
from tests.media_models import image_config, image_model, sound_model, sound_processor, tone

NEW = 5
TEXTS = ["<audio>a picture", "of <audio> and <audio>the digit"]
SOUNDS = [tone(4000), tone(2500, 0.3), tone(5100, 0.1)]


def write(model: Any, inputs: Any, **options: Any) -> list[list[int]]:
    """New tokens of each row."""
    settings = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    whole = model.generate(**inputs, **settings | options)
    return whole[:, inputs["input_ids"].shape[1] :].tolist()


def asked(texts: Any, sounds: Any) -> Any:
    return sound_processor()(
        text=texts, audio=sounds, sampling_rate=16_000, return_tensors="pt", padding=True,
        padding_side="left",
    )  # fmt: skip


def test_the_processor_lays_as_many_tokens_as_the_model_makes() -> None:
    model, found = sound_model(), asked(TEXTS, SOUNDS)
    places = found["input_ids"] == model.config.audio_token_id
    with torch.no_grad():
        sizes = [
            len(one)
            for one in model.get_audio_features(
                found["input_features"], found["feature_attention_mask"]
            )
        ]
    assert len(set(sizes)) == 3
    assert places.sum(1).tolist() == [sizes[0], sizes[1] + sizes[2]]
    with pytest.raises(ValueError, match=r"'<audio>' 1 times, and there are 0 sounds"):
        sound_processor()(text="<audio>")
    with pytest.raises(ValueError, match="give text"):
        sound_processor()(audio=SOUNDS[0])
    with pytest.raises(ValueError, match="sampling rate"):
        sound_processor()(text="<audio>", audio=SOUNDS[0], sampling_rate=8_000)


def test_answers_are_the_same_alone_or_padded_and_from_the_engine() -> None:
    model = sound_model()
    own = [SOUNDS[:1], SOUNDS[1:]]
    batch = write(model, asked(TEXTS, SOUNDS))
    engine = Engine(model, max_num_seqs=2, prefill_chunk=5, page_size=4)
    for text, sounds, wanted in zip(TEXTS, own, batch, strict=True):
        one = asked(text, sounds)
        assert write(model, one) == [wanted]
        ids = one["input_ids"]
        with torch.no_grad():
            features = model.get_audio_features(
                one["input_features"], one["feature_attention_mask"]
            )
        places = (ids[0] == model.config.audio_token_id).nonzero()[:, 0].tolist()
        prompt = EmbeddedPrompt(ids[0].tolist(), torch.cat(features), places)
        (output,) = engine.generate(prompt, greedy(NEW, ignore_eos=True))
        assert list(output.completions[0].token_ids) == wanted
    with torch.no_grad():
        one, other = (model(**asked(TEXTS[0], [sound])).logits[0, -1] for sound in SOUNDS[::2])
    assert not torch.allclose(one, other)


def test_the_loss_reaches_the_audio_part(tmp_path: Path) -> None:
    model = MoRForConditionalGeneration(sound_model().config)
    one = asked(TEXTS[1], SOUNDS[:2])
    labels = one["input_ids"].masked_fill(one["input_ids"] == model.config.audio_token_id, -100)
    model.train()
    model(**one, labels=labels).loss.backward()
    assert all(
        parameter.grad is not None and bool(parameter.grad.any())
        for parameter in model.audio_prefix.parameters()
    )
    model.eval().save_pretrained(tmp_path)
    sound_processor().save_pretrained(tmp_path)
    loaded = load_model(tmp_path)
    assert type(loaded) is MoRForConditionalGeneration
    assert type(AutoProcessor.from_pretrained(tmp_path)) is MoRAudioProcessor
    again = load_processor(tmp_path)(text=TEXTS[1], audio=SOUNDS[:2], return_tensors="pt")
    assert torch.equal(again["input_features"], one["input_features"])
    assert write(loaded, again) == write(model, one)


def test_what_does_not_fit_is_named() -> None:
    model, one = sound_model(), asked(TEXTS[0], SOUNDS[:1])
    wrong = one | {"input_ids": one["input_ids"][:, 1:]}
    for call in (model, model.generate):
        with pytest.raises(ValueError, match="places with audio_token_id="):
            call(input_ids=wrong["input_ids"], input_features=one["input_features"])
    with pytest.raises(ValueError, match="go with input_ids"):
        model(input_features=one["input_features"])
    with pytest.raises(ValueError, match="use_cache=False does not go with input_features"):
        model.generate(**one, use_cache=False)
    with pytest.raises(ValueError, match="this one hears sounds"):
        model(one["input_ids"], torch.zeros(1, 1, 8, 16))
    with pytest.raises(ValueError, match="this one reads images"):
        image_model()(torch.tensor([[1]]), input_features=one["input_features"])


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"audio_token_id": 3, "num_mel_bins": 4}, "exclude each other"),
        ({"image_token_id": None, "audio_token_id": 3}, "num_mel_bins=None"),
        ({"image_token_id": None, "audio_token_id": 10**6, "num_mel_bins": 4}, "audio_token_id="),
        ({"image_token_id": None, "audio_token_id": 3, "num_mel_bins": 4, "modality": "audio",
          "num_labels": 3}, "audio_token_id=3 is for models of text that hear sounds"),
    ],
)  # fmt: skip
def test_configurations_that_cannot_be_are_refused(fields: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        image_config(**fields)
