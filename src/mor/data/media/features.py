"""Samples of sound into frames of log-mel, by Transformers' own feature extractor."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from mor.checks import check_whole
from mor.data.media.errors import BadMedia
from mor.data.media.sounds import LEAST_RATE, MOST_RATE, Sound

if TYPE_CHECKING:
    from transformers import Speech2TextFeatureExtractor

WINDOW = 400  # samples, as the extractor has it
HOP = 160


@dataclass(frozen=True)
class FrameSettings:
    """How sound becomes frames.

    Attributes:
        sampling_rate: in samples per second; sounds of another are changed to it.
        mels: numbers of a frame.
    """

    sampling_rate: int = 16_000
    mels: int = 40

    def __post_init__(self) -> None:
        """Raise `MorError` for a value out of range."""
        check_whole("sampling_rate", self.sampling_rate, LEAST_RATE, MOST_RATE)
        check_whole("mels", self.mels, 1, 128)


def make_extractor(settings: FrameSettings) -> Speech2TextFeatureExtractor:
    """The extractor: Kaldi's log-mel of 400 samples every 160, normalised within each sound."""
    from transformers import Speech2TextFeatureExtractor

    return Speech2TextFeatureExtractor(
        feature_size=settings.mels,
        num_mel_bins=settings.mels,
        sampling_rate=settings.sampling_rate,
    )


def frames_of(sound: Sound, extractor: Speech2TextFeatureExtractor) -> np.ndarray:
    """The frames of a sound: float32 [frames, mels].

    Raises:
        BadMedia: it is shorter than one window, or the same in every frame (silence), which
            cannot be normalised.
    """
    if len(sound.samples) < WINDOW:
        raise BadMedia(
            f"the sound has {len(sound.samples)} samples, fewer than the {WINDOW} of one frame"
        )
    with np.errstate(divide="ignore", invalid="ignore"):
        made = extractor(sound.samples, sampling_rate=sound.sampling_rate)
    frames = np.asarray(made["input_features"][0], dtype=np.float32)
    if not np.isfinite(frames).all():
        raise BadMedia("the sound is silent, or the same in every frame")
    return frames
