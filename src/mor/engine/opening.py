"""A model folder, opened for an engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from mor.folder.network import Weights, is_plain, load_network
from mor.model.servable import Servable, ServedNetwork


def load_servable(folder: str | Path, dtype: torch.dtype = torch.float32) -> Servable:
    """The model of a model folder or a run folder, on the CPU.

    A model of texts alone comes without Transformers' model around it, whose code takes seconds
    to import.

    Args:
        folder: of the model or the run.
        dtype: of its weights; a router keeps float32.

    Raises:
        MorError: see :func:`mor.hf.load.load_model`.
    """
    if is_plain(folder):
        return load_network(folder, dtype)
    from mor.hf.load import load_model

    return load_model(folder, dtype)


def open_servable(folder: str | Path, dtype: Weights = "float32") -> Servable:
    """As :func:`load_servable`, on the GPU where there is one."""
    model: Any = load_servable(folder, torch.bfloat16 if dtype == "bfloat16" else torch.float32)
    if torch.cuda.is_available():
        (model.model if isinstance(model, ServedNetwork) else model).cuda()
    return model
