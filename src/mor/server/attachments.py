"""Images and sounds within a request: data URLs and base64; nothing is fetched."""

from __future__ import annotations

import base64
import binascii
import re
from typing import Any

import numpy as np
from torch import Tensor

from mor.data.media.errors import BadMedia
from mor.data.media.images import ImageLimits, decode_image
from mor.data.media.sounds import AudioLimits, Sound, decode_audio
from mor.server.errors import ApiError

IMAGE_LIMITS = ImageLimits(max_bytes=16 << 20, max_pixels=16 << 20)
AUDIO_LIMITS = AudioLimits(max_bytes=16 << 20, max_seconds=60.0)
DETAILS = (None, "auto", "low", "high", "original")
_DATA_URL = re.compile(
    r"data:([\w.+-]+/[\w.+-]+)?((?:;[\w.+-]+=[^;,]*)*)(;base64)?,", re.IGNORECASE
)
_BLANKS = re.compile(r"[ \t\r\n\f]+")


def read_image(value: Any, path: str, limits: ImageLimits = IMAGE_LIMITS) -> np.ndarray:
    """Pixels uint8 [H, W, 3] of an ``image_url``: ``{"url": "data:image/png;base64,..."}``.

    Args:
        value: as it came.
        path: of the field, for messages.
        limits: what is too large.

    Raises:
        ApiError: 400: another shape, a URL that is no data URL, wrong base64, or no image that can
            be taken (:func:`mor.data.media.images.decode_image`).
    """
    if not isinstance(value, dict) or not isinstance(value.get("url"), str):
        raise _wrong(f"{path}: give {{'url': 'data:image/png;base64,...'}}", path)
    _refuse_unknown(value, ("url", "detail"), path)
    if value.get("detail") not in DETAILS:
        raise _wrong(f"{path}.detail: one of auto, low, high, original", f"{path}.detail")
    data = _read_url(value["url"], f"{path}.url")
    return _decode(lambda: decode_image(data, limits), path, "invalid_image")


def read_audio(
    value: Any, path: str, sampling_rate: int, limits: AudioLimits = AUDIO_LIMITS
) -> Sound:
    """One channel of an ``input_audio``: ``{"data": base64, "format": "wav"}``.

    Args:
        value: as it came.
        path: of the field, for messages.
        sampling_rate: that the model takes; another is made into it.
        limits: what is too large.

    Raises:
        ApiError: 400, as :func:`read_image`.
    """
    if not isinstance(value, dict) or not isinstance(value.get("data"), str):
        raise _wrong(f"{path}: give {{'data': base64, 'format': 'wav'}}", path)
    _refuse_unknown(value, ("data", "format"), path)
    told = value.get("format")
    if told not in (None, "wav", "mp3", "flac", "ogg"):
        raise _wrong(f"{path}.format: one of wav, mp3, flac, ogg", f"{path}.format")
    text = value["data"]
    data = _read_url(text, f"{path}.data") if text[:5].lower() == "data:" else None
    found = _from_base64(text, f"{path}.data") if data is None else data
    return _decode(
        lambda: decode_audio(found, limits, sampling_rate=sampling_rate), path, "invalid_audio"
    )


def read_frames(value: Any, path: str, extractor: Any) -> dict[str, Tensor]:
    """Frames of an ``input_audio`` as a feature extractor makes them, one row.

    Args:
        value: as it came.
        path: of the field, for messages.
        extractor: of the model; its ``sampling_rate`` is what the sound is brought to.

    Raises:
        ApiError: 400, as :func:`read_audio`; or no frames can be made of it.
    """
    rate = int(extractor.sampling_rate)
    sound = read_audio(value, path, rate)
    try:
        with np.errstate(divide="ignore", invalid="ignore"):
            made = extractor(sound.samples, sampling_rate=rate, return_tensors="pt")
    except (ValueError, AssertionError, RuntimeError) as error:  # shorter than a frame
        why = f"no frames can be made of the sound: {error}"
        raise ApiError(400, f"{path}: {why}", param=path, code="invalid_audio") from None
    found = dict(made)
    if not all(bool(one.isfinite().all()) for one in found.values()):
        why = "the sound is silent, or the same in every frame"
        raise ApiError(400, f"{path}: {why}", param=path, code="invalid_audio")
    return found


def _read_url(url: str, path: str) -> bytes:
    match = _DATA_URL.match(url[:1000])
    if match is None or not match[3]:
        shown = url[:40].encode("ascii", "backslashreplace").decode()
        raise ApiError(
            400,
            f"{path}: only data URLs with base64 (data:image/png;base64,...) are taken; this "
            f"server fetches nothing (found {shown!r})",
            param=path,
            code="invalid_url",
        )
    return _from_base64(url[match.end() :], path)


def _from_base64(text: str, path: str) -> bytes:
    try:
        return base64.b64decode(_BLANKS.sub("", text), validate=True)
    except (binascii.Error, ValueError) as error:
        raise ApiError(
            400, f"{path}: wrong base64: {error}", param=path, code="invalid_base64"
        ) from None


def _decode(work: Any, path: str, code: str) -> Any:
    try:
        return work()
    except BadMedia as error:
        raise ApiError(400, f"{path}: {error}", param=path, code=code) from None


def _refuse_unknown(value: dict[str, Any], names: tuple[str, ...], path: str) -> None:
    for name in value:
        if name not in names:
            raise ApiError(
                400, f"Unknown field: {path}.{name[:80]!a}", param=path, code="unknown_field"
            )


def _wrong(message: str, path: str) -> ApiError:
    return ApiError(400, message, param=path, code="invalid_value")
