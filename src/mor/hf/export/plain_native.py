"""What stands for the compiled kernels in an exported folder: none fits, the plain forms run."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

_POINTWISE: dict[str, Callable[[Tensor], Tensor]] = {
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "silu": F.silu,
    "gelu": F.gelu,
}


class Ragged:
    """Rows of several lengths over pages: the engine's, which is not here."""


class Pieces:
    """Which queries meet which keys: of attention in training, compiled, which is not here."""


class FlashAttention:
    """Attention in training, compiled, which is not here; nothing asks for it: see `trains`."""


def trains(*tensors: Tensor) -> bool:
    """False: nothing was compiled."""
    return False


class RouterAnswers:
    """What is asked of a router in one call, which is not here; nothing asks for it: see `fits`."""


def route(*arguments: object, **options: object) -> None:
    """Answers of a router in one call, where tensors fit; here none do.

    Raises:
        RuntimeError: always.
    """
    raise RuntimeError("a router was asked of kernels that are not here; ask `fits` first")


def fits(*tensors: Tensor) -> bool:
    """False: nothing was compiled."""
    return False


def pointwise(name: str, x: Tensor) -> Tensor:
    """Function ``name`` of every number of ``x``."""
    return _POINTWISE[name](x)


def own_linear(x: Tensor, weight: Tensor, index: Tensor) -> Tensor:
    """[M, outputs]: row i of x [M, k] by the matrix ``weight[index[i]]`` of [sets, outputs, k]."""
    return torch.bmm(weight[index], x[:, :, None])[:, :, 0]
