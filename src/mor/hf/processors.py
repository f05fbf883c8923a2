"""The processor beside a model of images or sounds: what its training data were made with."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from transformers import AutoFeatureExtractor

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
    if index.kind != "images":
        feature_extractor(index).save_pretrained(out)
        return
    height, width, _ = index.shape
    image_processor(index, (height, width)).save_pretrained(out)


def feature_extractor(index: MediaIndex) -> Any:
    """What made frames of the folder's sounds; where they came as frames, what normalises these."""
    if (index.directory / PROCESSOR).is_file():
        return AutoFeatureExtractor.from_pretrained(index.directory, local_files_only=True)
    return MoRFeatureExtractor(index.shape[0], index.mean, index.std)


def image_processor(index: MediaIndex, size: tuple[int, int]) -> Any:
    """Transformers' ``ViTImageProcessor``, and for grey images ours.

    Args:
        index: of a folder of images, whose colours, mean and deviation count.
        size: height and width that images are brought to.
    """
    # Pillow is needed for images alone.
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

    from mor.hf.grey import MoRImageProcessor

    channels = index.shape[2]
    options: dict[str, Any] = {
        "size": {"height": size[0], "width": size[1]},
        "image_mean": list(index.mean or [0.0] * channels),
        "image_std": list(index.std or [1.0] * channels),
    }
    kind = MoRImageProcessor if channels == 1 else ViTImageProcessorPil
    return kind(**options)
