"""Chats with images, over HTTP."""

from __future__ import annotations

import base64
import io
import struct
import zlib
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import torch
from PIL import Image

from mor.engine import Engine
from mor.errors import MorError
from mor.server.readers import ImageReader
from tests.media_models import PATCHES, image_model, image_processor, image_tokenizer, picture
from tests.server.live import NAME, Live, serving

CHAT = "/v1/chat/completions"


def png(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    held = io.BytesIO()
    image.save(held, kind, **options)
    return held.getvalue()


def url(data: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def part(data: bytes | str) -> dict[str, Any]:
    where = data if isinstance(data, str) else url(data)
    return {"type": "image_url", "image_url": {"url": where}}


def said(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


def header_of(width: int, height: int) -> bytes:
    """A PNG that promises so many pixels and holds none."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
        )

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    rows = chunk(b"IDAT", zlib.compress(b"\0" * 64))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + rows + chunk(b"IEND", b"")


@pytest.fixture(scope="module")
def seeing() -> Iterator[Live]:
    engine = Engine(image_model(), image_tokenizer(), max_num_seqs=4, page_size=4, prefill_chunk=7)
    reader = ImageReader(image_model(), image_processor())
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    with serving(engine, images=reader, chat_template=template) as running:
        yield running


def ask(live: Live, content: Any, **fields: Any) -> httpx.Response:
    body = {"model": NAME, "messages": [{"role": "user", "content": content}], "temperature": 0,
            "max_tokens": 5, "ignore_eos": True, "return_token_ids": True}  # fmt: skip
    with live.http() as client:
        return client.post(CHAT, json=body | fields)


def own_tokens(text: str, images: list[Image.Image]) -> list[int]:
    """What ``generate`` says to the same."""
    inputs = image_processor()(text=text, images=images, return_tensors="pt")
    generate: Any = image_model().generate
    whole = generate(**inputs, max_new_tokens=5, do_sample=False, pad_token_id=0, eos_token_id=None)
    found: list[int] = whole[0, inputs["input_ids"].shape[1] :].tolist()
    return found


def test_an_answer_is_what_generate_says_and_patches_are_tokens(seeing: Live) -> None:
    content = [said("a "), part(png(picture(1))), said("digit")]
    answer = ask(seeing, content).json()
    assert answer["choices"][0]["token_ids"] == own_tokens("a <image>digit", [picture(1)])
    text = len(image_tokenizer()("a <image>digit").input_ids)
    assert answer["usage"]["prompt_tokens"] == text - 1 + PATCHES
    again = ask(seeing, content).json()
    assert again["choices"] == answer["choices"]
    assert again["usage"]["prompt_tokens_details"]["cached_tokens"] == PATCHES  # two pages of 4
    other = ask(seeing, [said("a "), part(png(picture(2))), said("digit")]).json()
    assert other["choices"][0]["token_ids"] == own_tokens("a <image>digit", [picture(2)])
    two = ask(seeing, [part(png(picture(1))), said("of"), part(png(picture(2)))]).json()
    images = [picture(1), picture(2)]
    assert two["choices"][0]["token_ids"] == own_tokens("<image>of<image>", images)
    seeing.wait_idle()


def test_an_answer_tells_how_deep_the_patches_went(seeing: Live) -> None:
    images = [picture(1), picture(6)]
    content = [said("a "), part(png(images[0])), said("digit"), part(png(images[1]))]
    choices = ask(seeing, content, n=2, temperature=1.0, seed=3).json()["choices"]
    inputs = image_processor()(text="a <image>digit<image>", images=images, return_tensors="pt")
    with torch.no_grad():
        depths: Any = image_model()(**inputs).depths
    wanted = depths[inputs["input_ids"] == image_model().config.image_token_id].view(2, PATCHES)
    assert wanted.unique().numel() > 1
    told = [{"grid": [2, 4], "depths": one} for one in wanted.tolist()]
    assert [choice["image_depths"] for choice in choices] == [told, told]
    capped = ask(seeing, content, depth_cap=1).json()["choices"][0]["image_depths"]
    assert max(capped[0]["depths"]) == 1
    assert "image_depths" not in ask(seeing, "a digit").json()["choices"][0]
    client, turns = seeing.openai(), [{"role": "user", "content": content}]
    chunks = [
        chunk.choices[0].model_dump()
        for chunk in client.chat.completions.create(
            model=NAME,
            messages=turns,
            max_tokens=4,
            stream=True,  # type: ignore[arg-type]
        )
    ]
    assert next(chunk.get("image_depths") for chunk in chunks if chunk["depths"]) == told
    assert sum("image_depths" in chunk for chunk in chunks) == 1


def test_the_openai_client_streams_it(seeing: Live) -> None:
    client = seeing.openai()
    turns: Any = [{"role": "user", "content": [part(png(picture(3))), said("three")]}]
    plain = client.chat.completions.create(
        model=NAME, messages=turns, temperature=0, max_tokens=5
    ).choices[0].message.content  # fmt: skip
    parts = client.chat.completions.create(
        model=NAME, messages=turns, temperature=0, max_tokens=5, stream=True
    )
    assert "".join(one.choices[0].delta.content or "" for one in parts) == plain
    card = client.models.retrieve(NAME)
    assert card.modalities == ["text", "image"]  # type: ignore[attr-defined]
    text = client.chat.completions.create(
        model=NAME, messages=[{"role": "user", "content": "three"}], max_tokens=2
    )
    assert text.usage is not None


def test_many_forms_of_images_are_taken(seeing: Live) -> None:
    """Of the same pixels: the same answer; of others: an answer."""
    grey = picture(4)
    wanted = own_tokens("<image>a", [grey])
    same = [
        png(grey), png(grey.convert("RGB")), png(grey, "BMP"), png(grey, "GIF"),
        png(grey.convert("RGBA")), png(grey, "TIFF"),
    ]  # fmt: skip
    for data in same:
        found = ask(seeing, [part(data), said("a")])
        assert found.status_code == 200, found.text
        assert found.json()["choices"][0]["token_ids"] == wanted
    deep = Image.fromarray(
        torch.randint(0, 65536, (8, 16), dtype=torch.int32).numpy().astype("uint16")
    )
    others = [
        png(grey.convert("RGB").convert("CMYK"), "JPEG"), png(deep), png(grey.convert("1")),
        png(grey.resize((300, 7))), png(grey.convert("P")), png(grey.convert("LA")),
    ]  # fmt: skip
    for data in others:
        found = ask(seeing, [part(data), said("a")])
        assert found.status_code == 200, found.text
    detailed = part(same[0])
    detailed["image_url"]["detail"] = "low"
    assert ask(seeing, [detailed, said("a")]).json()["choices"][0]["token_ids"] == wanted
    split = "data:image/png;charset=x;base64,\n" + "\n".join(url(same[0]).split(",")[1])
    assert ask(seeing, [part(split), said("a")]).json()["choices"][0]["token_ids"] == wanted


WHOLE = png(picture(1))
MOVING = png(picture(1), "GIF", save_all=True, append_images=[picture(2)])
IMAGE = "messages[0].content[0].image_url"


@pytest.mark.parametrize(
    ("image", "param", "code", "told"),
    [
        ("https://example.org/cat.png", f"{IMAGE}.url", "invalid_url", "only data URLs"),
        ("file:///etc/passwd", f"{IMAGE}.url", "invalid_url", "only data URLs"),
        ("", f"{IMAGE}.url", "invalid_url", "only data URLs"),
        ("data:image/png,abc", f"{IMAGE}.url", "invalid_url", "only data URLs"),
        ("data:image/png;base64,@@@@", f"{IMAGE}.url", "invalid_base64", "wrong base64"),
        ("data:image/png;base64,QUJ", f"{IMAGE}.url", "invalid_base64", "wrong base64"),
        ("data:image/png;base64,", IMAGE, "invalid_image", "empty"),
        (b"no image at all", IMAGE, "invalid_image", "no known format"),
        (WHOLE[:-30], IMAGE, "invalid_image", "damaged"),
        (WHOLE[:20], IMAGE, "invalid_image", "damaged"),
        (WHOLE[:40] + b"\xff" * 20 + WHOLE[60:], IMAGE, "invalid_image", "damaged"),
        (MOVING, IMAGE, "invalid_image", "animated"),
        (header_of(0, 5), IMAGE, "invalid_image", ""),
        (header_of(60_000, 60_000), IMAGE, "invalid_image", "max_pixels"),
        (header_of(5_000, 5_000), IMAGE, "invalid_image", "max_pixels"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", IMAGE, "invalid_image", "no known format"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n", IMAGE, "invalid_image", "no known format"),
    ],
)  # fmt: skip
def test_a_wrong_image_is_named(
    seeing: Live, image: bytes | str, param: str, code: str, told: str
) -> None:
    found = ask(seeing, [part(image), said("a")])
    assert found.status_code == 400, found.text
    error = found.json()["error"]
    assert (error["param"], error["code"]) == (param, code), error
    assert told in error["message"]
    assert error["message"].startswith(param)


@pytest.mark.parametrize(
    ("content", "param", "code"),
    [
        ([{"type": "image_url"}], IMAGE, "invalid_value"),
        ([{"type": "image_url", "image_url": url(WHOLE)}], IMAGE, "invalid_value"),
        ([{"type": "image_url", "image_url": {"url": 5}}], IMAGE, "invalid_value"),
        ([{"type": "image_url", "image_url": {"url": url(WHOLE), "size": 1}}], IMAGE,
         "unknown_field"),
        ([{"type": "image_url", "image_url": {"url": url(WHOLE), "detail": 1}}],
         f"{IMAGE}.detail", "invalid_value"),
        ([{"type": "text", "text": "a", "image_url": {"url": url(WHOLE)}}],
         "messages[0].content[0].image_url", "invalid_value"),
        ([{"type": "input_audio", "input_audio": {"data": "", "format": "wav"}}],
         "messages[0].content", "unsupported_parameter"),
        ("see <image> there", "messages[0].content", "invalid_value"),
        ([part(WHOLE)] * 40, "messages", "context_length_exceeded"),
    ],
)  # fmt: skip
def test_a_wrong_part_is_named(seeing: Live, content: Any, param: str, code: str) -> None:
    found = ask(seeing, content)
    assert found.status_code == 400, found.text
    error = found.json()["error"]
    assert error["code"] == code, error
    assert error["param"] in (param, "messages[0].content"), error


def test_images_stand_in_turns_of_the_user(seeing: Live) -> None:
    with seeing.http() as client:
        body = {"model": NAME, "messages": [{"role": "assistant", "content": [part(WHOLE)]}]}
        error = client.post(CHAT, json=body).json()["error"]
        assert "role 'assistant' has no images" in error["message"]
        body["messages"] = [{"role": "user", "content": [part(WHOLE), said("a")]}]
        counted = client.post("/tokenize", json=body).json()
        assert counted["count"] == PATCHES + len(image_tokenizer()("a").input_ids)
        schema = client.get("/openapi.json").json()["components"]["schemas"]["Part"]
        kinds = [shape["properties"]["type"]["const"] for shape in schema["anyOf"]]
        assert kinds == ["text", "refusal", "image_url"]


def test_a_template_that_leaves_images_out_is_told() -> None:
    engine = Engine(image_model(), image_tokenizer(), max_num_seqs=2, page_size=4)
    reader = ImageReader(image_model(), image_processor())
    template = "{{ messages[-1].content | replace('<image>', '') }}:"
    with serving(engine, images=reader, chat_template=template) as running:
        error = ask(running, [part(WHOLE), said("a")]).json()["error"]
    assert "writes 0 of the 1 images" in error["message"]


def test_a_model_of_text_refuses_images_whatever_they_hold(live: Live) -> None:
    for image in ({"url": url(WHOLE)}, {"url": 5}, None, "x"):
        error = ask(live, [{"type": "image_url", "image_url": image}]).json()["error"]
        assert error["code"] == "unsupported_parameter"
        assert error["message"].startswith("messages[0].content: parts of type 'image_url'")


def test_a_processor_of_another_model_is_refused() -> None:
    processor = image_processor()
    processor.num_image_tokens = 4
    with pytest.raises(MorError, match="num_image_tokens=4"):
        ImageReader(image_model(), processor)
    processor = image_processor()
    processor.image_token_id = 5
    with pytest.raises(MorError, match="image_token_id="):
        ImageReader(image_model(), processor)
