"""Where the host may ask a device for numbers, and the one place where training does on a GPU.

Each question makes the host wait until the device has done all that was asked before. On the CPU
there is nothing to wait for, so sizes are asked for wherever that saves work.
"""

from __future__ import annotations

import os
from importlib.util import find_spec

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


def explain_no_triton(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why kernels in Triton cannot run on numbers of ``dtype`` there; None where they can."""
    if find_spec("triton") is None:
        return "the package triton is not installed"
    if dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"it takes bfloat16, float16 and float32; weights are {dtype}"
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        return (
            None if capability >= (8, 0) else f"it needs compute capability 8.0, not {capability}"
        )
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1":
        return None
    return f"it needs a GPU, or TRITON_INTERPRET=1 on the CPU; the model is on {device}"
