"""Bytes of a PNG, JPEG, WebP, GIF, BMP, TIFF or PPM file into pixels, within limits.

Data preparation and the server use this one room, so that what a model trained on and what it is
asked about went the same way.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from mor.data.media.errors import BadMedia, check_bytes, need_media

if TYPE_CHECKING:
    from PIL.Image import Image

# No others: some of Pillow's readers start programs (EPS) or are old and little looked after.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
_WHITE = (255, 255, 255, 255)


@dataclass(frozen=True)
class ImageLimits:
    """What is too large. The header is looked at first: no pixel is decoded of what is refused.

    Attributes:
        max_bytes: of the file.
        max_pixels: width times height.
    """

    max_bytes: int = 32 * 2**20
    max_pixels: int = 32 * 2**20


DEFAULT_LIMITS = ImageLimits()


def decode_image(
    data: bytes, limits: ImageLimits = DEFAULT_LIMITS, mode: Literal["RGB", "L"] = "RGB"
) -> np.ndarray:
    """Decode one picture.

    CMYK, palettes and the like become `mode`; 16 bits a channel become 8 by their value, not by
    cutting; what is transparent lies on white; a camera's note which side is up is followed.

    Args:
        data: the file's bytes.
        limits: what is too large.
        mode: three channels or one.

    Returns:
        uint8 `[height, width, 3]`, or `[height, width, 1]` for `L`.

    Raises:
        BadMedia: no picture of a known format, cut short or damaged, without pixels, animated or
            of several pages, of float values, or beyond a limit.
        MorError: Pillow is not installed.
    """
    try:
        from PIL import Image, ImageOps
    except ImportError as error:
        raise need_media("images", "pillow") from error

    check_bytes(data, "image", limits.max_bytes)
    try:
        picture = Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.UnidentifiedImageError as error:
        raise BadMedia(
            "the image is of no known format, or its header is damaged; "
            f"known: {', '.join(FORMATS)}"
        ) from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise BadMedia(
            f"the image is larger than max_pixels={limits.max_pixels:,}: {error}"
        ) from error
    except Exception as error:  # each of Pillow's readers raises what its bytes lead it to
        raise BadMedia(f"the image is damaged: {error}") from error
    with picture:
        _check_size(picture, limits)
        try:
            picture.load()
            upright = ImageOps.exif_transpose(picture)
            return _pixels(upright, mode)
        except BadMedia:
            raise
        except Exception as error:
            raise BadMedia(f"the image is cut short or damaged: {error}") from error


def resize_image(
    pixels: np.ndarray, height: int, width: int, fit: Literal["crop", "squeeze"] = "crop"
) -> np.ndarray:
    """Another size, by area where it shrinks, so that no line is lost between pixels.

    Args:
        pixels: uint8 `[H, W, 1 or 3]`.
        height, width: in pixels.
        fit: `crop` keeps proportions and cuts what stands out, evenly on both sides; `squeeze`
            keeps all of the picture and not its proportions.

    Returns:
        uint8 `[height, width, 1 or 3]`.
    """
    if pixels.shape[:2] == (height, width):
        return pixels
    from PIL import Image, ImageOps

    picture = Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
    how, size = Image.Resampling.BICUBIC, (width, height)
    resized = ImageOps.fit(picture, size, how) if fit == "crop" else picture.resize(size, how)
    values = np.asarray(resized)
    return values if values.ndim == 3 else values[..., None]


def _check_size(picture: Image, limits: ImageLimits) -> None:
    width, height = picture.size
    if width < 1 or height < 1:
        raise BadMedia(f"the image has no pixels: it is {width} x {height}")
    if width * height > limits.max_pixels:
        raise BadMedia(
            f"the image is {width} x {height} pixels, more than max_pixels={limits.max_pixels:,}"
        )
    try:
        frames = int(getattr(picture, "n_frames", 1))
    except Exception as error:  # it reads on through the file
        raise BadMedia(f"the image is cut short or damaged: {error}") from error
    # A telephone's JPEG (MPO) holds previews beside its picture: the first is the picture.
    if frames > 1 and picture.format != "MPO":
        raise BadMedia(
            f"the image is animated or has several pages ({frames}), expected a single picture"
        )


def _pixels(picture: Image, mode: Literal["RGB", "L"]) -> np.ndarray:
    from PIL import Image

    if picture.mode == "F":
        raise BadMedia("the image holds float values, expected whole numbers of 8 or 16 bits")
    if picture.mode.startswith("I"):
        values = np.asarray(picture).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise BadMedia("the image holds whole numbers of 32 bits, expected 8 or 16 bits")
        grey = ((values * 255 + 32767) // 65535).astype(np.uint8)
        picture = Image.fromarray(grey)
    if "transparency" in picture.info or picture.mode in ("RGBA", "LA", "PA", "RGBa", "La"):
        with_alpha = picture.convert("RGBA")
        ground = Image.new("RGBA", with_alpha.size, _WHITE)
        picture = Image.alpha_composite(ground, with_alpha)
    # By way of RGB, since not every mode becomes grey in one step.
    pixels = np.array(picture.convert("RGB").convert(mode))
    return pixels if pixels.ndim == 3 else pixels[..., None]
