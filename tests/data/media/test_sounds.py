"""Sounds of all kinds: decoded rightly, or refused in words."""

from __future__ import annotations

import io
import struct

import numpy as np
import pytest

from mor.data.media.errors import BadMedia
from mor.data.media.sounds import AudioLimits, decode_audio
from mor.errors import MorError

soundfile = pytest.importorskip("soundfile")


def tone(rate: int, seconds: float = 0.5, hertz: float = 440.0) -> np.ndarray:
    return (0.5 * np.sin(2 * np.pi * hertz * np.arange(int(rate * seconds)) / rate)).astype(
        np.float32
    )


def save(samples: np.ndarray, rate: int, kind: str = "WAV", subtype: str | None = None) -> bytes:
    held = io.BytesIO()
    soundfile.write(held, samples, rate, format=kind, subtype=subtype)
    return held.getvalue()


@pytest.mark.parametrize(
    ("kind", "subtype", "error"),
    [
        ("WAV", "PCM_U8", 1e-2),
        ("WAV", "PCM_16", 1e-4),
        ("WAV", "PCM_24", 1e-6),
        ("WAV", "PCM_32", 1e-6),
        ("WAV", "FLOAT", 1e-7),
        ("WAV", "DOUBLE", 1e-7),
        ("WAV", "ULAW", 3e-2),
        ("WAVEX", "PCM_16", 1e-4),
        ("RF64", "PCM_16", 1e-4),
        ("FLAC", "PCM_16", 1e-4),
        ("AIFF", "PCM_16", 1e-4),
    ],
)
def test_samples_come_back(kind: str, subtype: str, error: float) -> None:
    samples = tone(16_000)
    sound = decode_audio(save(samples, 16_000, kind, subtype))
    assert sound.sampling_rate == 16_000
    assert sound.samples.dtype == np.float32
    np.testing.assert_allclose(sound.samples, samples, atol=error)
    assert sound.seconds == pytest.approx(0.5)


@pytest.mark.parametrize("kind", ["OGG", "MP3"])
def test_lossy_formats(kind: str) -> None:
    sound = decode_audio(save(tone(16_000), 16_000, kind))
    assert sound.seconds == pytest.approx(0.5, abs=0.2)
    assert np.abs(np.fft.rfft(sound.samples)).argmax() / sound.seconds == pytest.approx(
        440, rel=0.02
    )


@pytest.mark.parametrize("rate", [8_000, 11_025, 22_050, 44_100, 48_000])
def test_rates_become_the_one_that_is_wanted(rate: int) -> None:
    pytest.importorskip("soxr")
    sound = decode_audio(save(tone(rate), rate), sampling_rate=16_000)
    assert sound.sampling_rate == 16_000
    inner = slice(800, -800)
    np.testing.assert_allclose(
        sound.samples[inner], tone(16_000)[: len(sound.samples)][inner], atol=5e-3
    )


def test_channels_become_their_mean() -> None:
    left, right = tone(16_000), tone(16_000, hertz=700.0)
    data = save(np.stack([left, right], 1), 16_000, subtype="FLOAT")
    np.testing.assert_allclose(decode_audio(data).samples, (left + right) / 2, atol=1e-6)


def test_a_length_that_the_writer_did_not_know() -> None:
    data = bytearray(save(tone(16_000), 16_000, subtype="PCM_16"))
    for unknown in (0xFFFFFFFF, 0x7FFFF000):
        data[40:44] = struct.pack("<I", unknown)
        assert decode_audio(bytes(data)).seconds == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "empty: it has no bytes"),
        (b"hello", "no known format"),
        (save(np.zeros(0, np.float32), 16_000), "empty: it has no samples"),
        (save(tone(16_000), 16_000)[:30], "cut short"),
        (save(tone(16_000), 16_000)[:-1], "cut short: its header promises 16,000 bytes"),
        (save(tone(16_000), 16_000, "FLAC")[:-900], "cut short"),
        (save(np.full(9, np.nan, np.float32), 16_000, subtype="FLOAT"), "no numbers"),
        (save(tone(500, 4.0), 500), "sampling rate of 500, expected 1,000 to 384,000"),
        (save(tone(1_000, 61.0), 1_000), "61.0 s long, more than max_seconds=60"),
        (save(tone(1_000, 61.0), 1_000, "FLAC"), "61.0 s long, more than max_seconds=60"),
    ],
)
def test_what_is_wrong_is_said(data: bytes, message: str) -> None:
    with pytest.raises(BadMedia, match=message):
        decode_audio(data)


def test_limits_and_rates_are_checked() -> None:
    data = save(tone(16_000), 16_000)
    with pytest.raises(BadMedia, match="max_bytes=100"):
        decode_audio(data, AudioLimits(max_bytes=100))
    with pytest.raises(BadMedia, match=r"max_seconds=0\.2"):
        decode_audio(data, AudioLimits(max_seconds=0.2))
    with pytest.raises(MorError, match="sampling_rate=10"):
        decode_audio(data, sampling_rate=10)


def test_altered_bytes_never_escape() -> None:
    noise = np.random.default_rng(1)
    for kind in ("WAV", "FLAC", "OGG", "MP3"):
        whole = save(tone(16_000, 0.1), 16_000, kind)
        for _ in range(40):
            data = bytearray(whole)
            for place in noise.integers(0, min(len(data), 200), 4):
                data[place] = int(noise.integers(0, 256))
            try:
                assert decode_audio(bytes(data)).samples.ndim == 1
            except BadMedia:
                continue
