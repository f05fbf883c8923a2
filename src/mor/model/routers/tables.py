"""Numbers of a configuration by depth and step: constants on a device, capacities that warm up."""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor


@lru_cache(maxsize=64)
def constant(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A constant that decoding looks up at every tick."""
    with torch.inference_mode(False):  # whoever asks first, it is an ordinary tensor
        return torch.tensor(values, dtype=dtype, device=device)


def warm_capacity(final: float, step: int, warmup: int) -> float:
    """Capacity at optimiser step ``step``: c + (1 - c) (1 + cos(pi min(1, step / warm-up))) / 2."""
    if step >= warmup:
        return final
    return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * step / warmup))
