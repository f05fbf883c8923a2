"""The page at ``/`` with pictures, in a real Chromium."""

from __future__ import annotations

import base64
from typing import Any

import numpy as np
import pytest
from transformers import ASTFeatureExtractor

from mor.engine import Engine
from mor.server.readers import ImageReader, SoundReader
from tests.media_models import (
    image_model,
    image_processor,
    image_tokenizer,
    picture,
    sound_model,
    sound_processor,
    sound_tokenizer,
    tone,
)
from tests.server.live import serving
from tests.server.test_classify import (
    classifying,
    image_classifier,
    post,
    sound,
    sound_classifier,
    wav,
)
from tests.server.test_images import ask, part, png, said
from tests.server.test_playground import browser, page, settle  # noqa: F401


def given(seed: int) -> dict[str, Any]:
    return {"name": "picture.png", "mimeType": "image/png", "buffer": png(picture(seed))}


def test_a_picture_shows_its_class_and_the_depth_of_each_patch(page: Any) -> None:  # noqa: F811
    with classifying(image_classifier()) as client:
        page.goto(str(client.base_url))
        page.wait_for_selector("#legend span")
        page.set_input_files("#file", given(1))
        settle(page, "done")
        (answer,) = post(client, part(png(picture(1)))).json()["data"]
        cells = page.locator("#map div")
        depths = [int(d) for d in cells.evaluate_all("all => all.map(t => t.dataset.depth)")]
        assert depths == answer["depths"]
        assert page.text_content("#label") == answer["label"]
        assert page.locator("#classes tr").count() == 3
        mean = sum(depths) / len(depths)
        assert page.text_content("#mean") == f"mean depth {mean:.2f} of 3"
        # The cells lie over the picture, a row of patches in a row.
        boxes = cells.evaluate_all("all => all.map(t => t.getBoundingClientRect().top)")
        assert len(set(boxes)) == 2
        page.uncheck("#show")
        assert "off" in (page.get_attribute("#map", "class") or "")
        broken = {"name": "a.png", "mimeType": "image/png", "buffer": b"no picture"}
        page.set_input_files("#file", broken)
        settle(page, "failed")
        assert "no known format" in (page.text_content("#problem") or "")
        assert page.locator("#found").is_hidden()


def test_a_dropped_sound_shows_its_class_and_the_depth_of_each_frame(page: Any) -> None:  # noqa: F811
    pytest.importorskip("soundfile")
    pytest.importorskip("soxr")
    hear = ASTFeatureExtractor(num_mel_bins=16, max_length=32)
    data = wav(np.sin(np.arange(8000) * 0.2) * 0.5, 16_000)
    with classifying(sound_classifier(hear, 16)) as client:
        page.goto(str(client.base_url))
        page.wait_for_selector("#legend span")
        drop(page, data)
        settle(page, "done")
        (answer,) = post(client, sound(data)).json()["data"]
        cells = page.locator("#map div")
        depths = [int(d) for d in cells.evaluate_all("all => all.map(t => t.dataset.depth)")]
        assert depths == answer["depths"]
        assert page.text_content("#label") == answer["label"]
        assert page.locator("#sound").is_visible()
        assert page.locator("#picture").is_hidden()
        # The spectrogram has something to show, and the frames lie beneath it, side by side.
        ink = page.locator("#sound").evaluate(
            "c => new Set(c.getContext('2d').getImageData(0, 0, c.width, c.height).data).size"
        )
        assert ink > 10
        box, tops = (
            page.locator("#sound").bounding_box(),
            cells.evaluate_all("all => [...new Set(all.map(t => t.getBoundingClientRect().top))]"),
        )
        assert len(tops) == 1
        assert tops[0] >= box["y"] + box["height"]
        drop(page, data[:100])
        settle(page, "failed")
        assert "input[0].input_audio" in (page.text_content("#problem") or "")


def drop(onto: Any, data: bytes) -> None:
    """A file let fall on the page, as a hand does it."""
    dropped = onto.evaluate_handle(
        """text => {
            const bytes = Uint8Array.from(atob(text), (one) => one.charCodeAt(0));
            const held = new DataTransfer();
            held.items.add(new File([bytes], "word.wav", { type: "audio/wav" }));
            return held;
        }""",
        base64.b64encode(data).decode(),
    )
    onto.dispatch_event("#drop", "drop", {"dataTransfer": dropped})


def test_a_picture_in_a_chat_streams_its_caption(page: Any) -> None:  # noqa: F811
    engine = Engine(image_model(), image_tokenizer(), max_num_seqs=2, page_size=4)
    reader = ImageReader(image_model(), image_processor())
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    with serving(engine, images=reader, chat_template=template) as live:
        page.goto(live.url)
        page.wait_for_selector("#legend span")
        assert page.locator("#image-row").is_visible()  # a chat from the start
        page.set_input_files("#image", given(1))
        page.wait_for_selector("#shown:visible")
        page.fill("#prompt", "a")
        page.fill("#most", "5")
        page.check("#eos")
        page.fill("#temperature", "0")
        page.click("#go")
        settle(page, "done (most tokens)")
        choice = ask(live, [part(png(picture(1))), said("a")]).json()["choices"][0]
        shown = page.locator("#out .t").evaluate_all("all => all.map(t => t.dataset.depth)")
        assert [int(depth) for depth in shown] == choice["depths"]
        assert page.locator("#out .t").all_text_contents() != []
        assert page.locator("#out img").count() == 1
        cells = page.locator("#out .seen .map div")
        patches = [
            int(depth) for depth in cells.evaluate_all("all => all.map(t => t.dataset.depth)")
        ]
        assert patches == choice["image_depths"][0]["depths"]
        # Each cell lies on the picture.
        picture_box = page.locator("#out .seen img").bounding_box()
        boxes = [cells.nth(place).bounding_box() for place in (0, cells.count() - 1)]
        assert all(abs(boxes[0][side] - picture_box[side]) < 1 for side in "xy")
        for side, size in (("x", "width"), ("y", "height")):
            ends = [box[side] + box[size] for box in (boxes[1], picture_box)]
            assert abs(ends[0] - ends[1]) < 1
        page.uncheck("#map")
        assert page.locator("#out .map").is_hidden()
        assert page.locator("#shown").is_hidden()


def test_a_sound_in_a_chat_is_answered(page: Any) -> None:  # noqa: F811
    pytest.importorskip("soundfile")
    pytest.importorskip("soxr")
    engine = Engine(sound_model(), sound_tokenizer(), max_num_seqs=2, page_size=4)
    reader = SoundReader(sound_model(), sound_processor())
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    data = wav(tone(4000), 16_000)
    with serving(engine, images=reader, chat_template=template) as live:
        page.goto(live.url)
        page.wait_for_selector("#legend span")
        assert page.text_content("#what") == "Sound"
        page.set_input_files(
            "#image", {"name": "word.wav", "mimeType": "audio/wav", "buffer": data}
        )
        page.wait_for_selector("#named:visible")
        assert page.text_content("#named") == "word.wav"
        assert page.locator("#shown").is_hidden()
        page.fill("#prompt", "a")
        page.fill("#most", "5")
        page.check("#eos")
        page.fill("#temperature", "0")
        page.click("#go")
        settle(page, "done (most tokens)")
        choice = ask(live, [sound(data), said("a")]).json()["choices"][0]
        shown = page.locator("#out .t").evaluate_all("all => all.map(t => t.dataset.depth)")
        assert [int(depth) for depth in shown] == choice["depths"]
        assert "[word.wav]" in (page.text_content("#out") or "")
