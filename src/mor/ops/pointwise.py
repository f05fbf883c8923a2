"""Functions of single numbers for decoding: a token's result does not hang on its batch.

PyTorch computes the last few numbers of a tensor in another way than the ones before, so that a
token's sigmoid may differ in the last bit with the number of tokens beside it. Where the kernels
run (float32 on the CPU without gradients) these do not; elsewhere they are PyTorch's.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mor.ops import native


def sigmoid(x: Tensor) -> Tensor:
    """1 / (1 + exp(-x))."""
    return native.pointwise("sigmoid", x) if native.fits(x) else torch.sigmoid(x)


def tanh(x: Tensor) -> Tensor:
    """The hyperbolic tangent."""
    return native.pointwise("tanh", x) if native.fits(x) else torch.tanh(x)


def silu(x: Tensor) -> Tensor:
    """x sigmoid(x)."""
    return native.pointwise("silu", x) if native.fits(x) else F.silu(x)


def gelu(x: Tensor) -> Tensor:
    """x times the normal distribution's cumulative function at x, exact."""
    return native.pointwise("gelu", x) if native.fits(x) else F.gelu(x)
