"""Frames that are there already, made into what models of sounds take.

Waveforms are for Transformers' own: ``ASTFeatureExtractor``, ``WhisperFeatureExtractor`` or
``Speech2TextFeatureExtractor``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from transformers import BatchFeature
from transformers.feature_extraction_sequence_utils import SequenceFeatureExtractor


class MoRFeatureExtractor(SequenceFeatureExtractor):
    """Coefficients per frame that are there already: normalised, padded, with a mask.

    Args:
        feature_size: numbers per frame.
        mean, std: of each of them, taken off and divided by; None: 0 and 1.
        sampling_rate: frames per second, for who asks; it changes nothing.
        padding_value: what stands behind a short sound.
    """

    model_input_names = ["input_features", "attention_mask"]  # noqa: RUF012

    def __init__(
        self,
        feature_size: int = 12,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        sampling_rate: int = 100,
        padding_value: float = 0.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(feature_size, sampling_rate, padding_value, **kwargs)
        self.mean = None if mean is None else list(mean)
        self.std = None if std is None else list(std)
        for name, values in (("mean", self.mean), ("std", self.std)):
            if values is not None and len(values) != feature_size:
                raise ValueError(
                    f"{name} has {len(values)} numbers; feature_size={feature_size} needs as many"
                )

    def __call__(
        self,
        frames: Any,
        sampling_rate: int | None = None,
        padding: bool | str = True,
        return_tensors: str | None = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """``input_features`` [B, T, feature_size] and ``attention_mask`` [B, T].

        Args:
            frames: [T, feature_size] of one sound, or a list of such.
            sampling_rate: not looked at.
            padding, return_tensors, kwargs: as for Transformers' ``pad``.

        Raises:
            ValueError: frames of another width, or none.
        """
        single = hasattr(frames, "ndim") and frames.ndim == 2
        if not len(frames):
            raise ValueError("frames holds no sound; give [T, feature_size], or a list of such")
        single = single or (isinstance(frames, (list, tuple)) and np.ndim(frames[0]) == 1)
        sounds = [np.asarray(one, np.float32) for one in ([frames] if single else frames)]
        for one in sounds:
            if one.ndim != 2 or one.shape[1] != self.feature_size or not len(one):
                raise ValueError(
                    f"frames have shape {one.shape}; each sound must be [T, {self.feature_size}], "
                    "at least one frame"
                )
        mean = 0.0 if self.mean is None else np.asarray(self.mean, np.float32)
        std = 1.0 if self.std is None else np.asarray(self.std, np.float32)
        batch = BatchFeature({"input_features": [(one - mean) / std for one in sounds]})
        kwargs.setdefault("return_attention_mask", True)
        padded: BatchFeature = self.pad(
            batch, padding=padding, return_tensors=return_tensors, **kwargs
        )
        return padded
