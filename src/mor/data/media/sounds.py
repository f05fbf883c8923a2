"""Bytes of a WAV, FLAC, Ogg or MP3 file into samples of one channel, within limits."""

from __future__ import annotations

import io
import struct
from dataclasses import dataclass
from typing import Any

import numpy as np

from mor.checks import check_whole
from mor.data.media.errors import BadMedia, check_bytes, need_media

LEAST_RATE, MOST_RATE = 1_000, 384_000
# What programs that write into a pipe leave in a WAV file's header, not knowing its length.
_UNKNOWN_SIZES = 0x7FFF0000


@dataclass(frozen=True)
class AudioLimits:
    """What is too large. The header is looked at first.

    Attributes:
        max_bytes: of the file.
        max_seconds: of sound.
    """

    max_bytes: int = 32 * 2**20
    max_seconds: float = 60.0


DEFAULT_LIMITS = AudioLimits()


@dataclass(frozen=True)
class Sound:
    """One channel of sound.

    Attributes:
        samples: float32 `[n]`, whole scale from -1 to 1.
        sampling_rate: samples per second.
    """

    samples: np.ndarray
    sampling_rate: int

    @property
    def seconds(self) -> float:
        """How long it is."""
        return len(self.samples) / self.sampling_rate


def decode_audio(
    data: bytes, limits: AudioLimits = DEFAULT_LIMITS, sampling_rate: int | None = None
) -> Sound:
    """Decode one sound: any sample format and rate; several channels become their mean.

    Args:
        data: the file's bytes.
        limits: what is too large.
        sampling_rate: the rate wanted, in samples per second; None for the file's own.

    Raises:
        BadMedia: no sound of a known format, cut short, without samples, with samples that are
            no numbers, of a rate outside 1,000 to 384,000, or beyond a limit.
        MorError: the packages soundfile, or soxr where the rate changes, are not installed.
    """
    if sampling_rate is not None:
        check_whole("sampling_rate", sampling_rate, LEAST_RATE, MOST_RATE)
    check_bytes(data, "sound", limits.max_bytes)
    _check_whole_wav(data)
    samples, rate = _read(data, limits)
    if samples.size == 0:
        raise BadMedia("the sound is empty: it has no samples")
    mono = samples.mean(axis=1, dtype=np.float64).astype(np.float32)
    if not np.isfinite(mono).all():
        raise BadMedia("the sound has samples that are no numbers (NaN or infinite)")
    if sampling_rate is None or sampling_rate == rate:
        return Sound(mono, rate)
    return Sound(resample(mono, rate, sampling_rate), sampling_rate)


def resample(samples: np.ndarray, rate: int, wanted: int) -> np.ndarray:
    """Samples float32 `[n]` at another rate, without what would fold back into hearing.

    Raises:
        MorError: the package soxr is not installed.
    """
    try:
        import soxr
    except ImportError as error:
        raise need_media("sounds of another rate", "soxr") from error
    changed: np.ndarray = soxr.resample(samples, rate, wanted)
    return changed.astype(np.float32, copy=False)


def _read(data: bytes, limits: AudioLimits) -> tuple[np.ndarray, int]:
    """Samples float32 `[n, channels]` and the rate."""
    try:
        import soundfile
    except (ImportError, OSError) as error:  # OSError: without its C library
        raise need_media("sounds", "soundfile") from error
    try:
        with soundfile.SoundFile(io.BytesIO(data)) as file:
            rate, frames = int(file.samplerate), int(file.frames)
            _check_header(rate, frames, limits)
            # A stream may not say how long it is, so no more is read than may be.
            samples: Any = file.read(int(limits.max_seconds * rate) + 1, "float32", always_2d=True)
    except soundfile.SoundFileError as error:
        raise BadMedia(f"the sound is of no known format, cut short or damaged: {error}") from error
    _check_header(rate, len(samples), limits)
    if len(samples) < frames and frames < _UNKNOWN_SIZES:
        raise BadMedia(
            f"the sound is cut short: its header promises {frames:,} samples, {len(samples):,} are "
            "there"
        )
    return samples, rate


def _check_header(rate: int, frames: int, limits: AudioLimits) -> None:
    if not LEAST_RATE <= rate <= MOST_RATE:
        raise BadMedia(
            f"the sound has a sampling rate of {rate}, expected {LEAST_RATE:,} to {MOST_RATE:,}"
        )
    if _UNKNOWN_SIZES > frames > limits.max_seconds * rate:
        raise BadMedia(
            f"the sound is {frames / rate:.1f} s long, more than max_seconds={limits.max_seconds:g}"
        )


def _check_whole_wav(data: bytes) -> None:
    """Refuse a WAV file that ends before its header says: the library reads what there is."""
    if data[:4] != b"RIFF" or data[8:12] != b"WAVE":
        return
    place = 12
    while place + 8 <= len(data):
        name, size = data[place : place + 4], struct.unpack_from("<I", data, place + 4)[0]
        place += 8
        if name == b"data":
            there = len(data) - place
            if there < size < _UNKNOWN_SIZES:
                raise BadMedia(
                    f"the sound is cut short: its header promises {size:,} bytes of samples, "
                    f"{there:,} are there"
                )
            return
        place += size + size % 2
    raise BadMedia("the sound is cut short: the WAV file ends before its samples")
