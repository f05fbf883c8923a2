"""The processor beside a model of images or sounds: what its training data were made with."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from mor.data.media import MediaIndex
from mor.hf.frames import MoRFeatureExtractor
from mor.run_files import PROCESSOR


def save_processor(index: MediaIndex, out: Path) -> None:
    """Write ``preprocessor_config.json``, so that pipelines treat new inputs as training did.

    Sounds: the folder's own, where waveforms were made into frames there; else one that normalises
    given coefficients. Images: Transformers' ``ViTImageProcessor``, and for grey ones ours.

    Args:
        index: of the prepared folder.
        out: the model folder.
    """
    given = index.directory / PROCESSOR
    if given.is_file():
        shutil.copyfile(given, out / PROCESSOR)
        return
    mean, std = index.mean, index.std
    if index.kind != "images":
        MoRFeatureExtractor(index.shape[0], mean, std).save_pretrained(out)
        return
    # Pillow is needed for images alone.
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

    from mor.hf.grey import MoRImageProcessor

    height, width, channels = index.shape
    options: dict[str, Any] = {
        "size": {"height": height, "width": width},
        "image_mean": list(mean or [0.0] * channels),
        "image_std": list(std or [1.0] * channels),
    }
    kind = MoRImageProcessor if channels == 1 else ViTImageProcessorPil
    kind(**options).save_pretrained(out)
