"""Examples to look at: pixels or frames, and how deep the tokens of each went, easy to hard."""

from __future__ import annotations

import base64
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mor.config import MoRConfig
from mor.data.media import MediaDataset

COUNT = 12


def show_examples(
    config: MoRConfig,
    dataset: MediaDataset,
    nlls: Tensor,
    answers: Tensor,
    depths: list[Tensor],
    count: int = COUNT,
) -> list[dict[str, Any]]:
    """A few examples from the surest right answer to the surest wrong one, evenly spread.

    Args:
        config: of the model.
        dataset: the examples, the first of which were answered.
        nlls: [n] nats of the right class.
        answers: [n] the class that the model chose.
        depths: of each example, int64 [its tokens].
        count: how many.

    Returns:
        of each: ``place``, ``truth``, ``answer`` (names), ``nll``, ``mean_depth``, ``depths``
        (rows of patches, or one row of tokens), ``frames_per_token`` (1 for images), ``shape``
        and ``values``: base64 of uint8 in C order, pixels or frames from lowest to highest.
    """
    order = torch.argsort(nlls, stable=True)
    picks = torch.linspace(0, len(order) - 1, min(count, len(order))).round().long()
    shown = []
    for place in order[picks].tolist():
        raw, image = dataset.raw(place).numpy(), config.modality == "image"
        own = depths[place]
        rows = config.patch_grid if image else (1, len(own))
        shown.append(
            {
                "place": place,
                "truth": dataset.index.classes[int(dataset.labels[place])],
                "answer": dataset.index.classes[int(answers[place])],
                "nll": float(nlls[place]),
                "mean_depth": float(own.double().mean()),
                "depths": own.view(rows).tolist(),
                "frames_per_token": 1 if image else config.frames_per_token,
                "shape": list(raw.shape),
                "values": base64.b64encode(_as_bytes(raw).tobytes()).decode(),
            }
        )
    return shown


def _as_bytes(raw: np.ndarray) -> np.ndarray:
    """Uint8 as it is; floats from their lowest to their highest as 0 to 255."""
    if raw.dtype == np.uint8:
        return np.ascontiguousarray(raw)
    low, high = float(raw.min()), float(raw.max())
    scaled: np.ndarray = ((raw - low) * (255 / max(high - low, 1e-9))).round().astype(np.uint8)
    return scaled
