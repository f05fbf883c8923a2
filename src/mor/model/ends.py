"""What the stream is turned into: logits of the vocabulary, classes, or the next patch or frame."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mor.config import MoRConfig


def build_head(config: MoRConfig) -> nn.Linear:
    """The linear map that ``config.head_type`` names, behind the final norm."""
    width = config.hidden_size
    if config.head_type == "vocabulary":
        return nn.Linear(width, config.vocab_size, bias=False)
    if config.head_type == "classes":
        return nn.Linear(width, config.num_labels or 1)
    return nn.Linear(width, config.input_width)


def pool(hidden: Tensor, real: Tensor | None, how: str) -> Tensor:
    """One vector of each row, [B, T, D] -> [B, D].

    Args:
        hidden: after the final norm; zero at padding.
        real: bool [B, T], at least one true in each row; None for all.
        how: ``mean`` of the real tokens, or the ``last`` of them.
    """
    if how == "last":
        if real is None:
            return hidden[:, -1]
        last = real.shape[1] - 1 - real.flip(1).int().argmax(1)
        index = last[:, None, None].expand(-1, 1, hidden.shape[2])
        return hidden.gather(1, index)[:, 0]
    if real is None:
        return hidden.mean(1)
    # In 32 bits at least: in 16 a sum may be beyond all numbers, and counts are no longer exact.
    wide = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
    weights = real.to(wide.dtype)
    mean = (wide * weights[..., None]).sum(1) / weights.sum(1, keepdim=True)
    return mean.to(hidden.dtype)
