"""Chats with sounds, over HTTP."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from mor.engine import Engine
from mor.errors import MorError
from mor.hf import MoRAudioProcessor, MoRFeatureExtractor
from mor.server.readers import SoundReader
from tests.media_models import BINS, sound_model, sound_processor, sound_tokenizer, tone
from tests.server.live import NAME, Live, serving
from tests.server.test_classify import sound, wav
from tests.server.test_images import CHAT, WHOLE, ask, part, said

pytest.importorskip("soundfile")
pytest.importorskip("soxr")
RATE = 16_000
PLACE = "messages[0].content[0].input_audio"


@pytest.fixture(scope="module")
def hearing() -> Iterator[Live]:
    engine = Engine(sound_model(), sound_tokenizer(), max_num_seqs=4, page_size=4, prefill_chunk=7)
    reader = SoundReader(sound_model(), sound_processor())
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    with serving(engine, images=reader, chat_template=template) as running:
        yield running


def own_tokens(text: str, sounds: list[np.ndarray]) -> list[int]:
    """What ``generate`` says to the same."""
    inputs = sound_processor()(
        text=text, audio=sounds, sampling_rate=RATE, return_tensors="pt"
    )  # fmt: skip
    generate: Any = sound_model().generate
    whole = generate(**inputs, max_new_tokens=5, do_sample=False, pad_token_id=0, eos_token_id=None)
    found: list[int] = whole[0, inputs["input_ids"].shape[1] :].tolist()
    return found


def heard(samples: np.ndarray) -> np.ndarray:
    """The samples as a WAV of 16 bits keeps them, and libsndfile reads them."""
    whole: np.ndarray = (samples * 32767).astype("<i2").astype(np.float32) / 32768
    return whole


def test_an_answer_is_what_generate_says_and_frames_are_tokens(hearing: Live) -> None:
    one, two = tone(4000), tone(2600, 0.3)
    content = [said("a "), sound(wav(one, RATE)), said("digit")]
    answer = ask(hearing, content).json()
    wanted = own_tokens("a <audio>digit", [heard(one)])
    assert answer["choices"][0]["token_ids"] == wanted
    tokens = answer["usage"]["prompt_tokens"]
    again = ask(hearing, content).json()
    assert again["choices"] == answer["choices"]
    assert again["usage"]["prompt_tokens_details"]["cached_tokens"] > 0
    both = ask(hearing, [sound(wav(one, RATE)), said("of"), sound(wav(two, RATE))]).json()
    wanted = own_tokens("<audio>of<audio>", [heard(one), heard(two)])
    assert both["choices"][0]["token_ids"] == wanted
    assert both["usage"]["prompt_tokens"] > tokens
    with hearing.http() as client:
        body = {"model": NAME, "messages": [{"role": "user", "content": content}]}
        assert client.post("/tokenize", json=body).json()["count"] == tokens
        schema = client.get("/openapi.json").json()["components"]["schemas"]["Part"]
        kinds = [shape["properties"]["type"]["const"] for shape in schema["anyOf"]]
        assert kinds == ["text", "refusal", "input_audio"]
        assert client.get("/v1/models").json()["data"][0]["modalities"] == ["text", "audio"]
    hearing.wait_idle()


def test_sounds_of_any_rate_and_number_of_channels_are_heard(hearing: Live) -> None:
    samples = tone(4000)
    wanted = ask(hearing, [sound(wav(samples, RATE)), said("a")]).json()["choices"]
    stereo = sound(wav(np.repeat(samples, 2), RATE, 2))
    assert ask(hearing, [stereo, said("a")]).json()["choices"] == wanted
    for rate in (8_000, 22_050, 44_100):
        found = ask(hearing, [sound(wav(tone(rate // 4), rate)), said("a")])
        assert found.status_code == 200, found.text
    client = hearing.openai()
    turns: Any = [{"role": "user", "content": [sound(wav(samples, RATE)), said("a")]}]
    parts = client.chat.completions.create(
        model=NAME, messages=turns, temperature=0, max_tokens=3, stream=True
    )
    assert sum(bool(one.choices[0].depths) for one in parts) == 3  # type: ignore[attr-defined]


WRONG = {
    "cut": wav(tone(4000), RATE)[:-100], "no samples": wav(tone(1)[:0], RATE), "nothing": b"",
    "none": b"no sound at all", "rate": wav(tone(4000), 500), "silent": wav(np.zeros(4000), RATE),
    "shorter than a frame": wav(tone(200), RATE), "header": wav(tone(4000), RATE)[:20],
    "too long": wav(np.zeros(61 * 2000), 2_000),
}  # fmt: skip


@pytest.mark.parametrize("why", WRONG)
def test_a_wrong_sound_is_named(hearing: Live, why: str) -> None:
    found = ask(hearing, [sound(WRONG[why]), said("a")])
    assert found.status_code == 400, found.text
    error = found.json()["error"]
    assert (error["param"], error["code"]) == (PLACE, "invalid_audio"), error
    assert error["message"].startswith(PLACE)


@pytest.mark.parametrize(
    ("content", "param", "code"),
    [
        ([{"type": "input_audio"}], PLACE, "invalid_value"),
        ([{"type": "input_audio", "input_audio": {"data": 5}}], PLACE, "invalid_value"),
        ([{"type": "input_audio", "input_audio": {"data": "@@@@"}}], f"{PLACE}.data",
         "invalid_base64"),
        ([{"type": "input_audio", "input_audio": {"data": "", "format": "aac"}}],
         f"{PLACE}.format", "invalid_value"),
        ([{"type": "input_audio", "input_audio": {"data": "", "rate": 1}}], PLACE,
         "unknown_field"),
        ([{"type": "input_audio", "input_audio": {"data": "https://example.org/a.wav"}}],
         f"{PLACE}.data", "invalid_base64"),
        ([part(WHOLE)], "messages[0].content", "unsupported_parameter"),
        ("say <audio>", "messages[0].content", "invalid_value"),
        ([sound(wav(tone(160_000), RATE))] * 3, "messages", "context_length_exceeded"),
    ],
)  # fmt: skip
def test_a_wrong_part_is_named(hearing: Live, content: Any, param: str, code: str) -> None:
    found = ask(hearing, content)
    assert found.status_code == 400, found.text
    error = found.json()["error"]
    assert (error["param"], error["code"]) == (param, code), error


def test_sounds_stand_in_turns_of_the_user_of_models_that_hear(hearing: Live, live: Live) -> None:
    given = sound(wav(tone(4000), RATE))
    body = {"model": NAME, "messages": [{"role": "system", "content": [given]}]}
    with hearing.http() as client:
        assert "role 'system' has no sounds" in client.post(CHAT, json=body).text
    for held in (given["input_audio"], {"data": 5}, None, "x"):
        error = ask(live, [{"type": "input_audio", "input_audio": held}]).json()["error"]
        assert error["code"] == "unsupported_parameter"
        assert "parts of type 'input_audio' are not supported; only text" in error["message"]


def test_a_processor_of_another_model_is_refused() -> None:
    processor = sound_processor()
    processor.conv_stride = [2]
    with pytest.raises(MorError, match=r"conv_stride=\[2\]"):
        SoundReader(sound_model(), processor)
    frames = MoRAudioProcessor(MoRFeatureExtractor(BINS), sound_tokenizer(), conv_stride=[2, 2])
    with pytest.raises(MorError, match="takes frames, not sounds"):
        SoundReader(sound_model(), frames)
