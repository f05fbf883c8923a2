"""Weights in aligned memory, so that a product's last bits do not hang on where they came from.

Libraries for matrix products may add in another order where a matrix does not begin on a cache
line (MKL does on AMD processors). PyTorch allocates on cache lines; what a library maps from a
file, or what NumPy made, begins anywhere.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

CACHE_LINE = 64
"""Bytes; also what PyTorch's allocator aligns to on the CPU."""


def aligned(tensor: Tensor) -> Tensor:
    """``tensor`` itself if it begins on a cache line, else a copy that does.

    Only plain tensors in the CPU's memory are looked at: those on other devices, and subclasses
    such as a sharded one, have an allocator of their own.
    """
    plain = type(tensor) in (Tensor, nn.Parameter)
    if not plain or tensor.device.type != "cpu" or tensor.layout != torch.strided:
        return tensor
    return tensor if tensor.data_ptr() % CACHE_LINE == 0 else tensor.detach().clone()


def align_weights(module: nn.Module) -> None:
    """Move every parameter and buffer that does not begin on a cache line to memory that does.

    Names, values, and which names share one weight stay as they are.
    """
    moved: dict[tuple[object, ...], Tensor] = {}  # two parameters over the same numbers stay that
    for tensor in (*module.parameters(), *module.buffers()):
        found = aligned(tensor)
        if found is not tensor:
            place = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
            tensor.data = moved.setdefault(place, found)
