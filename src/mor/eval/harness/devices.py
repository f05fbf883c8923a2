"""The device that lm-eval asks for."""

from __future__ import annotations

import torch

from mor.errors import MorError


def choose_device(name: str | None) -> torch.device:
    """The device that lm-eval asks for.

    Raises:
        MorError: it is none.
    """
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name is None or (str(name).startswith("cuda") and not gpus):
        return torch.device("cuda" if gpus else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or (device.type == "cuda" and (device.index or 0) >= gpus):
        raise MorError(
            f"device={name!r} is not here; use cpu" + (", cuda or cuda:N" if gpus else "")
        )
    return device
