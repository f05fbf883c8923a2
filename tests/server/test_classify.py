"""``POST /v1/classify`` of models of images and of sounds."""

from __future__ import annotations

import asyncio
import base64
import io
import threading
import time
import wave
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import schemathesis
import torch
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode
from transformers import ASTFeatureExtractor, Speech2TextFeatureExtractor
from typer.testing import CliRunner

from mor import MoRConfig, MoRForAudioClassification, MoRForImageClassification
from mor.cli.app import app
from mor.errors import MorError
from mor.hf.frames import MoRFeatureExtractor
from mor.hf.grey import MoRImageProcessor
from mor.server import make_server
from mor.server.classifier import Classifier
from mor.server.classify import create_classifier_app
from mor.server.errors import ApiError
from mor.server.schema.classify import Item
from tests.media_models import picture, tone
from tests.server.test_images import MOVING, WHOLE, header_of, part, png
from tests.server.test_schema import CHECKS

NAME = "tiny"
SHAPE: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_recursions": 3,
    "num_recursion_layers": 1, "router": "threshold", "initializer_range": 0.25, "num_labels": 3,
    "id2label": {0: "cat", 1: "cow", 2: "dog"}, "label2id": {"cat": 0, "cow": 1, "dog": 2},
}  # fmt: skip


def image_classifier() -> Classifier:
    torch.manual_seed(1)
    config = MoRConfig(modality="image", image_size=[8, 16], patch_size=4, num_channels=1, **SHAPE)
    processor = MoRImageProcessor(
        size={"height": 8, "width": 16}, image_mean=[0.5], image_std=[0.5]
    )
    return Classifier(MoRForImageClassification(config).eval(), processor, max_waiting=4)


def sound_classifier(processor: Any, bins: int) -> Classifier:
    torch.manual_seed(1)
    config = MoRConfig(modality="audio", num_mel_bins=bins, max_position_embeddings=64, **SHAPE)
    return Classifier(MoRForAudioClassification(config).eval(), processor)


@contextmanager
def classifying(classifier: Classifier, **options: Any) -> Iterator[httpx.Client]:
    """A client of a server for the time of the block."""
    app = create_classifier_app(classifier, NAME, **options)
    server = make_server(app, port=0, drain_seconds=5.0, log_level="error")
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    end = time.monotonic() + 60
    while not server.started:
        assert thread.is_alive()
        assert time.monotonic() < end
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60.0) as client:
            yield client
    finally:
        server.should_exit = True
        thread.join(30)


@pytest.fixture(scope="module")
def images() -> Iterator[httpx.Client]:
    with classifying(image_classifier()) as client:
        yield client


def post(client: httpx.Client, given: Any, **fields: Any) -> httpx.Response:
    return client.post("/v1/classify", json={"model": NAME, "input": given} | fields)


def test_classes_and_depths_are_those_of_the_model(images: httpx.Client) -> None:
    classifier = image_classifier()
    answer = post(images, [part(png(picture(1))), part(png(picture(2)))]).json()
    assert answer["labels"] == ["cat", "cow", "dog"]
    for seed, found in zip((1, 2), answer["data"], strict=True):
        pixels = classifier.processor(picture(seed), return_tensors="pt")
        with torch.no_grad():
            output = classifier.model(**pixels)
        shares = output.logits[0].double().softmax(-1)
        assert found["probs"] == pytest.approx(shares.tolist(), abs=1e-6)
        assert found["label"] == answer["labels"][int(shares.argmax())]
        assert found["depths"] == output.depths[0].tolist()
        assert (found["grid"], found["num_classes"]) == ([2, 4], 3)
    assert answer["usage"] == {"prompt_tokens": 16, "total_tokens": 16}
    capped = post(images, part(png(picture(1))), depth_cap=1).json()["data"]
    assert max(capped[0]["depths"]) <= 1


@pytest.mark.parametrize(
    ("given", "fields", "param", "code"),
    [
        (part(WHOLE[:-30]), {}, "input[0].image_url", "invalid_image"),
        (part(MOVING), {}, "input[0].image_url", "invalid_image"),
        (part(header_of(60_000, 60_000)), {}, "input[0].image_url", "invalid_image"),
        (part("https://example.org/a.png"), {}, "input[0].image_url.url", "invalid_url"),
        ([part(WHOLE), part(b"none")], {}, "input[1].image_url", "invalid_image"),
        ({"type": "input_audio", "input_audio": {"data": ""}}, {}, "input[0]",
         "unsupported_parameter"),
        ({"type": "image_url"}, {}, None, "missing_field"),
        ([], {}, "input", "invalid_value"),
        ("text", {}, "input", "invalid_value"),
        (part(WHOLE), {"depth_cap": 4}, "depth_cap", "invalid_value"),
        (part(WHOLE), {"top": 4}, "top", "unknown_field"),
        (part(WHOLE), {"model": "other"}, "model", "model_not_found"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(
    images: httpx.Client, given: Any, fields: dict[str, Any], param: str | None, code: str
) -> None:
    answer = post(images, given, **fields)
    assert answer.status_code in (400, 404), answer.text
    error = answer.json()["error"]
    assert error["code"] == code, error
    assert param is None or error["param"] == param, error


def test_what_stands_around_it(images: httpx.Client) -> None:
    card = images.get("/v1/models").json()["data"][0]
    assert (card["task"], card["takes"], card["labels"][0]) == ("classify", "image_url", "cat")
    assert images.get(f"/v1/models/{NAME}").json() == card
    for path in ("/health", "/ready", "/version", "/metrics", "/openapi.json", "/"):
        assert images.get(path).status_code == 200, path
    assert post(images, [part(WHOLE)] * 5).status_code == 429
    assert images.get("/v1/chat/completions").status_code == 404
    with classifying(image_classifier(), api_keys=["k"], with_playground=False) as client:
        assert post(client, part(WHOLE)).status_code == 401
        assert client.get("/").status_code == 404


def wav(samples: np.ndarray, rate: int, channels: int = 1) -> bytes:
    held = io.BytesIO()
    with wave.open(held, "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes((samples * 32767).astype("<i2").tobytes())
    return held.getvalue()


def sound(data: bytes) -> dict[str, Any]:
    text = base64.b64encode(data).decode()
    return {"type": "input_audio", "input_audio": {"data": text, "format": "wav"}}


def test_sounds_of_any_rate_are_heard() -> None:
    pytest.importorskip("soundfile")
    pytest.importorskip("soxr")
    hear = ASTFeatureExtractor(num_mel_bins=16, max_length=32)
    tone = np.sin(np.arange(8000) * 0.2) * 0.5
    with classifying(sound_classifier(hear, 16)) as client:
        found = post(client, sound(wav(tone, 16_000))).json()["data"][0]
        assert (len(found["depths"]), found["grid"]) == (16, None)
        stereo = wav(np.repeat(tone, 2), 16_000, 2)
        assert post(client, sound(stereo)).json()["data"][0]["probs"] == found["probs"]
        for rate in (8_000, 44_100):
            assert post(client, sound(wav(tone, rate))).status_code == 200
        wrong = {
            "cut": wav(tone, 16_000)[:-100], "no samples": wav(tone[:0], 16_000), "none": b"x" * 50,
            "nothing": b"", "too long": wav(np.zeros(61 * 2000), 2_000), "rate": wav(tone, 500),
        }  # fmt: skip
        for why, data in wrong.items():
            error = post(client, sound(data)).json()["error"]
            place = ("input[0].input_audio", "invalid_audio")
            assert (error["param"], error["code"]) == place, (why, error)


def test_silence_is_no_sound() -> None:
    pytest.importorskip("soundfile")
    pytest.importorskip("soxr")
    hear = Speech2TextFeatureExtractor(feature_size=16, num_mel_bins=16)
    with classifying(sound_classifier(hear, 16)) as client:
        assert post(client, sound(wav(tone(4000), 16_000))).status_code == 200
        for samples in (np.zeros(4000), tone(200)):
            error = post(client, sound(wav(samples, 16_000))).json()["error"]
            place = ("input[0].input_audio", "invalid_audio")
            assert (error["param"], error["code"]) == place, error


def test_frames_of_coefficients_are_given_as_numbers() -> None:
    with classifying(sound_classifier(MoRFeatureExtractor(feature_size=4), 4)) as client:
        frames = np.random.default_rng(0).normal(size=(7, 4)).tolist()
        found = post(client, {"type": "input_features", "input_features": frames}).json()
        assert len(found["data"][0]["depths"]) == 4
        for wrong in ([], [[1.0]], [[0.0] * 4] * 300):
            given = {"type": "input_features", "input_features": wrong}
            assert post(client, given).status_code == 400
        assert post(client, part(WHOLE)).json()["error"]["code"] == "unsupported_parameter"


def test_a_model_without_classes_is_refused() -> None:
    classifier = image_classifier()
    classifier.config.problem_type = "regression"
    with pytest.raises(MorError, match="gives no classes"):
        Classifier(classifier.model, classifier.processor)


def test_inputs_that_wait_together_are_answered_as_alone() -> None:
    classifier = sound_classifier(MoRFeatureExtractor(feature_size=4), 4)
    draw = np.random.default_rng(2)
    sounds = [draw.normal(size=(length, 4)).tolist() for length in (3, 11, 7, 24, 5, 16)]
    items = [Item(type="input_features", input_features=one) for one in sounds]
    sizes: list[int] = []
    run = classifier.model.forward

    def count(**inputs: Any) -> Any:
        sizes.append(len(inputs["input_features"]))
        return run(**inputs)

    classifier.model.forward = count  # type: ignore[method-assign]

    async def ask() -> tuple[list[Any], list[Any], list[Any]]:
        alone = [(await classifier.classify([one], None))[0] for one in items]
        calls = [classifier.classify([one], 2 if place % 3 == 2 else None)
                 for place, one in enumerate(items)]  # fmt: skip
        mixed = [one for (one,) in await asyncio.gather(*calls)]
        capped = [(await classifier.classify([items[place]], 2))[0] for place in (2, 5)]
        return alone, mixed, capped

    alone, mixed, capped = asyncio.run(ask())
    classifier.stop()
    wanted = [*alone[:2], capped[0], *alone[3:5], capped[1]]
    for one, other in zip(mixed, wanted, strict=True):
        assert one["depths"] == other["depths"]
        assert one["probs"] == pytest.approx(other["probs"], abs=1e-6)
    assert len({tuple(one["depths"]) for one in alone}) > 1
    assert sizes[:6] == [1] * 6
    assert max(sizes[6:-2]) > 1  # some went together


def test_one_that_cannot_be_taken_does_not_spoil_the_others() -> None:
    classifier = sound_classifier(MoRFeatureExtractor(feature_size=4), 4)
    good, long = [[0.5] * 4] * 6, [[0.1] * 4] * 300
    items = [Item(type="input_features", input_features=one) for one in (good, long)]

    async def ask() -> list[Any]:
        calls = [classifier.classify([one], None) for one in (items[0], items[1], items[0])]
        return await asyncio.gather(*calls, return_exceptions=True)

    first, wrong, last = asyncio.run(ask())
    classifier.stop()
    assert first[0]["probs"] == pytest.approx(last[0]["probs"], abs=1e-6)
    assert "max_position_embeddings=64" in str(wrong)
    assert isinstance(wrong, ApiError)


@pytest.mark.slow
@pytest.mark.parametrize("mode", list(GenerationMode), ids=lambda mode: mode.value)
def test_the_classifier_keeps_to_its_schema(images: httpx.Client, mode: GenerationMode) -> None:
    api = schemathesis.openapi.from_url(f"{images.base_url}/openapi.json")

    @given(case=api["/v1/classify"]["post"].as_strategy(generation_mode=mode))
    @settings(max_examples=8, suppress_health_check=list(HealthCheck), deadline=None)
    def check(case: Any) -> None:
        case.call_and_validate(checks=CHECKS)

    check()


@pytest.mark.parametrize(
    ("option", "told"),
    [
        (["--replicas", "2"], "replicas='2': --replicas is of models that write text"),
        (["--quantization", "int8"], "quantization='int8'"),
        (["--chat-template", "x.jinja"], "chat_template='x.jinja'"),
        (["--no-prefix-caching"], "prefix_caching='False'"),
        (["--dtype", "float8"], "dtype='float8' is not known"),
    ],
)
def test_options_of_texts_are_refused(tmp_path: Path, option: list[str], told: str) -> None:
    image_classifier().config.save_pretrained(tmp_path)
    done = CliRunner().invoke(app, ["serve", str(tmp_path), *option])
    assert isinstance(done.exception, MorError)
    assert told in str(done.exception)
