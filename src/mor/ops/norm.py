"""Root-mean-square normalisation."""

from __future__ import annotations

import torch
from torch import Tensor


def rms_norm(hidden: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``weight * hidden / rms(hidden)``, the rms in float32 or wider (arXiv 1910.07467).

    Args:
        hidden: [..., D].
        weight: [D], or [..., D] where tokens carry different weights.
        eps: added to the mean square.

    Returns:
        [..., D] in ``hidden``'s dtype; the weight multiplies after the cast back, as Llama does.
    """
    wide = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight * wide.to(hidden.dtype)
