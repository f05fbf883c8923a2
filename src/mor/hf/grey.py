"""Grey images for models of one channel; Transformers' ``ViTImageProcessor`` serves the others.

Needs Pillow.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image
from transformers import BatchFeature
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil


class MoRImageProcessor(ViTImageProcessorPil):
    """``ViTImageProcessor`` for models of grey images: whatever comes is made grey first.

    Colours are weighed as Pillow does (0.299 R + 0.587 G + 0.114 B); what is transparent is white.
    """

    def preprocess(self, images: Any, *args: Any, **kwargs: Any) -> BatchFeature:
        """Pixels [B, 1, H, W] of one image or several: Pillow's, or arrays of 0 to 255."""
        several = isinstance(images, (list, tuple))
        grey = [make_grey(image) for image in (images if several else [images])]
        found: BatchFeature = super().preprocess(grey, *args, **kwargs)
        return found


def make_grey(image: Any) -> np.ndarray:
    """An image as uint8 or float [H, W, 1].

    Args:
        image: Pillow's, of any mode; or an array [H, W], [H, W, C] or [C, H, W], C being 1 or 3.

    Raises:
        ValueError: an array of another shape.
    """
    if hasattr(image, "convert"):
        if image.mode.startswith("I;16"):
            return np.asarray(image)[..., None] / 257.0
        if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
            image = image.convert("RGBA")
            under = Image.new("RGBA", image.size, "white")
            image = Image.alpha_composite(under, image)
        return np.asarray(image.convert("L"))[..., None]
    array = np.asarray(image)
    if array.ndim == 3 and array.shape[0] in (1, 3) and array.shape[2] not in (1, 3):
        array = np.moveaxis(array, 0, -1)
    if array.ndim == 2:
        array = array[..., None]
    if array.ndim != 3 or array.shape[2] not in (1, 3):
        raise ValueError(
            f"image has shape {array.shape}; it must be [H, W], or have 1 or 3 colours"
        )
    if array.shape[2] == 3:
        weighed = array @ np.array([0.299, 0.587, 0.114])
        array = weighed.round().astype(array.dtype)[..., None]
    return array
