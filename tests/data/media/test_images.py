"""Pictures of all kinds: decoded rightly, or refused in words."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from mor.data.media.errors import BadMedia
from mor.data.media.images import ImageLimits, decode_image, resize_image

RAMP = np.arange(0, 256, 5, dtype=np.uint8)[None, :].repeat(3, 0)


def save(picture: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    held = io.BytesIO()
    picture.save(held, kind, **options)
    return held.getvalue()


def png(width: int, height: int) -> bytes:
    """A PNG file whose header says what it likes."""

    def chunk(name: bytes, content: bytes) -> bytes:
        check = zlib.crc32(name + content)
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", check)

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "PPM", "GIF", "WEBP"])
def test_grey_values_come_back(kind: str) -> None:
    options = {"lossless": True} if kind == "WEBP" else {}
    data = save(Image.fromarray(RAMP), kind, **options)
    assert np.array_equal(decode_image(data), np.repeat(RAMP[..., None], 3, -1))
    assert np.array_equal(decode_image(data, mode="L"), RAMP[..., None])


def test_sixteen_bits_keep_their_order() -> None:
    deep = np.linspace(0, 65535, 52).astype(np.uint16)[None, :].repeat(3, 0)
    expected = np.round(deep / 257).astype(np.uint8)
    for kind in ("PNG", "TIFF"):
        assert np.array_equal(
            decode_image(save(Image.fromarray(deep), kind), mode="L")[..., 0], expected
        )


def test_cmyk_palettes_and_one_bit_become_rgb() -> None:
    red = Image.new("CMYK", (8, 8), (0, 255, 255, 0))
    pixel = decode_image(save(red, "JPEG", quality=100))[4, 4]
    assert pixel[0] > 240
    assert max(pixel[1:]) < 20
    blue = Image.new("RGB", (4, 4), (0, 0, 255)).convert("P", palette=Image.Palette.ADAPTIVE)
    assert decode_image(save(blue))[0, 0].tolist() == [0, 0, 255]
    assert decode_image(save(Image.new("1", (3, 2), 1))).tolist() == [[[255] * 3] * 3] * 2


def test_transparent_is_white() -> None:
    for mode, colour in [("RGBA", (255, 0, 0, 0)), ("LA", (0, 0))]:
        assert decode_image(save(Image.new(mode, (2, 2), colour)))[0, 0].tolist() == [255] * 3
    marked = Image.new("P", (2, 2), 0)
    marked.putpalette([9, 9, 9] * 256)
    assert decode_image(save(marked, transparency=0))[0, 0].tolist() == [255] * 3


def test_the_camera_says_which_side_is_up() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    data = save(Image.fromarray(np.zeros((4, 9, 3), np.uint8)), "JPEG", exif=exif)
    assert decode_image(data).shape == (9, 4, 3)


def test_what_is_no_single_picture_is_refused() -> None:
    frames = [Image.new("P", (4, 4), colour) for colour in (0, 1, 2)]
    for kind in ("GIF", "WEBP", "PNG", "TIFF"):
        moving = save(
            frames[0].convert("RGB"),
            kind,
            save_all=True,
            append_images=[f.convert("RGB").rotate(90) for f in frames[1:]]
            + [Image.new("RGB", (4, 4), "red")],
        )
        with pytest.raises(BadMedia, match="animated or has several pages"):
            decode_image(moving)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "BMP", "WEBP", "TIFF"])
def test_cut_short_at_any_place_is_refused(kind: str) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    whole = save(Image.fromarray(noise), kind)
    decode_image(whole)
    for length in {1, 4, 20, 60, len(whole) // 2, len(whole) - 40}:
        with pytest.raises(BadMedia):
            decode_image(whole[:length])


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "empty"),
        (b"hello", "no known format"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "no known format"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "no known format"),
        (png(0, 5), "image"),
        (png(5, 5), "cut short or damaged"),
        (png(100_000, 100_000), "max_pixels"),
        (png(6_000, 6_000), "6000 x 6000 pixels, more than max_pixels=33,554,432"),
        (
            b"\x89PNG\r\n\x1a\n" + b"\0" * (2**25),
            "33,554,440 bytes, more than max_bytes=33,554,432",
        ),
    ],
)
def test_what_is_wrong_is_said(data: bytes, message: str) -> None:
    with pytest.raises(BadMedia, match=message):
        decode_image(data)


def test_float_and_32_bit_values_are_refused() -> None:
    for values in (np.zeros((2, 2), np.float32), np.full((2, 2), 70_000, np.int32)):
        with pytest.raises(BadMedia, match="expected"):
            decode_image(save(Image.fromarray(values), "TIFF"))


def test_random_bytes_after_a_header_never_escape() -> None:
    noise = np.random.default_rng(1)
    whole = {
        kind: save(Image.fromarray(RAMP), kind)
        for kind in ("PNG", "JPEG", "GIF", "TIFF", "WEBP", "BMP")
    }
    for kind in whole:
        for _ in range(60):
            data = bytearray(whole[kind])
            for place in noise.integers(0, len(data), 4):
                data[place] = int(noise.integers(0, 256))
            try:
                pixels = decode_image(bytes(data), ImageLimits(max_pixels=10_000))
            except BadMedia:
                continue
            assert pixels.dtype == np.uint8
            assert pixels.shape[-1] == 3


def test_sizes() -> None:
    wide = np.zeros((10, 30, 1), np.uint8)
    wide[:, 10:20] = 200
    assert (resize_image(wide, 10, 10) == 200).all()
    squeezed = resize_image(wide, 5, 6, "squeeze")
    assert squeezed.shape == (5, 6, 1)
    assert squeezed[2, 0, 0] < 20
    assert squeezed[2, 3, 0] > 150
    assert resize_image(wide, 10, 30) is wide
    assert resize_image(np.zeros((7, 9, 3), np.uint8), 4, 4).shape == (4, 4, 3)
