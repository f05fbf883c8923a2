"""What makes embeddings of the images or sounds of a chat."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mor.errors import MorError
from mor.hf.frames import MoRFeatureExtractor
from mor.hf.hearing import MoRAudioProcessor
from mor.hf.load_media import load_processor
from mor.hf.processing import MoRProcessor
from mor.hf.vision_language import MoRForConditionalGeneration
from mor.server.attachments import read_frames, read_image
from mor.server.images import AUDIO_PART, IMAGE_PART, Reader


class ImageReader(Reader):
    """Reads images.

    Args:
        model: whose image part is used; nothing else of it is kept.
        processor: saved beside it.

    Raises:
        MorError: processor and model do not fit each other.
    """

    part, modality = IMAGE_PART, "image"

    def __init__(self, model: MoRForConditionalGeneration, processor: MoRProcessor) -> None:
        super().__init__()
        config = model.config
        if processor.num_image_tokens != config.num_patches:
            raise MorError(
                f"num_image_tokens={processor.num_image_tokens} of the processor is not the "
                f"{config.num_patches} patches of the model's images"
            )
        self._take_token(processor, config)
        self._prefix, self._pixels = model.image_prefix, processor.image_processor
        self.grid, self.size = config.patch_grid, config.num_patches

    def embed(self, path: str, value: Any) -> Tensor:
        """[P, D] of one image."""
        pixels = read_image(value, path)
        taken = self._pixels(pixels, return_tensors="pt")["pixel_values"]
        weight = next(self._prefix.parameters())
        with torch.inference_mode():
            found: Tensor = self._prefix(taken.to(weight.device, weight.dtype))[0]
        return found


class SoundReader(Reader):
    """Reads sounds: of any rate and number of channels, which become the model's.

    Args:
        model: whose audio part is used; nothing else of it is kept.
        processor: saved beside it.

    Raises:
        MorError: processor and model do not fit each other, or it makes frames of no samples.
    """

    part, modality = AUDIO_PART, "audio"

    def __init__(self, model: MoRForConditionalGeneration, processor: MoRAudioProcessor) -> None:
        super().__init__()
        config = model.config
        if processor.conv_stride != config.conv_stride:
            raise MorError(
                f"conv_stride={processor.conv_stride} of the processor is not the model's "
                f"{config.conv_stride}"
            )
        self._take_token(processor, config)
        self._frames = processor.feature_extractor
        if not hasattr(self._frames, "sampling_rate") or isinstance(
            self._frames, MoRFeatureExtractor
        ):
            raise MorError(
                f"the processor's {type(self._frames).__name__} takes frames, not sounds; a chat "
                "brings sounds, so save one that makes frames of them"
            )
        self._prefix = model.audio_prefix

    def embed(self, path: str, value: Any) -> Tensor:
        """[n, D] of one sound."""
        made = read_frames(value, path, self._frames)
        weight = next(self._prefix.parameters())
        frames, mask = made["input_features"], made.get("attention_mask")
        mask = None if mask is None else mask.to(weight.device)
        with torch.inference_mode():
            found, (length,) = self._prefix(frames.to(weight.device, weight.dtype), mask)
        told: Tensor = found[0, :length]
        return told


def make_reader(model: Any, folder: str | Path) -> Reader:
    """What reads images or sounds for ``model``, a MoRForConditionalGeneration of ``folder``.

    Raises:
        MorError: its processor is missing, damaged, or another model's.
    """
    processor = load_processor(folder)
    reads = ImageReader if model.config.audio_token_id is None else SoundReader
    return reads(model, processor)
