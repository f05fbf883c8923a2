"""Where the host may ask a device for numbers, and the one place where training does on a GPU.

Each question makes the host wait until the device has done all that was asked before. On the CPU
there is nothing to wait for, so sizes are asked for wherever that saves work.
"""

from __future__ import annotations

import torch
from torch import Tensor


def may_ask(device: torch.device) -> bool:
    """Whether a question costs nothing there."""
    return device.type == "cpu"


def read(numbers: Tensor) -> list[int]:
    """The planned read: whole numbers [N] for the host, all in one copy."""
    found: list[int] = numbers.tolist()
    return found


def one_hot(index: Tensor, count: int, dtype: torch.dtype) -> Tensor:
    """[..., count] 1 at ``index`` [...], else 0. PyTorch's own asks for the largest index."""
    return (index[..., None] == torch.arange(count, device=index.device)).to(dtype)
