"""Vocabulary projection and cross-entropy in one, a chunk of tokens at a time.

The logits of a batch are the largest tensor of a training step: [N, V] in float32, several times
over with its gradients. Here a chunk of them lives in one buffer, is turned into its own gradient
in place, and is gone. Gradients of hidden states and weight are made on the way forward, as in
Liger Kernel (arXiv 2410.10989); backward only scales them. PyTorch has had the like since 2.13
(``torch.nn.functional.linear_cross_entropy``); this one also runs before it and under autocast.

The plain form is ``F.cross_entropy(F.linear(hidden, weight), targets, reduction="sum")``.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

IGNORE = -100
# Logits in one chunk: enough rows for a fast matrix product, small enough for a CPU's cache.
_LOGITS_CPU = 2**21
_LOGITS_GPU = 2**27
_MIN_ROWS = 256


def chunk_rows(vocab_size: int, device_type: str) -> int:
    """Tokens whose logits are held at a time."""
    budget = _LOGITS_CPU if device_type == "cpu" else _LOGITS_GPU
    return max(_MIN_ROWS, budget // vocab_size)


def product_dtype(hidden: Tensor) -> torch.dtype:
    """What autocast would multiply in; it does not look into functions of our own."""
    kind = hidden.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype


def factors_of(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Hidden states [N, D] and weight as the functions here take them.

    Cut from the graph where no gradients are wanted: a function of our own is told which inputs
    could have one, and not whether anybody asks.

    Raises:
        ValueError: not one target for each hidden state.
    """
    if targets.shape != hidden.shape[:1]:
        raise ValueError(
            f"labels come to {tuple(targets.shape)} targets for {len(hidden)} tokens; "
            "there must be one for each token"
        )
    return (hidden, weight) if torch.is_grad_enabled() else (hidden.detach(), weight.detach())


def scaled_gradients(ctx: Any, direction: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of hidden states and weight that were made on the way forward, scaled."""
    to_hidden, to_weight = ctx.saved_tensors
    if to_hidden is not None:
        to_hidden = to_hidden * direction.to(to_hidden.dtype)
    if to_weight is not None:
        to_weight = (to_weight * direction).to(ctx.weight_dtype)
    return to_hidden, to_weight


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, rows: int) -> Tensor:
        """Sum over targets, float32, with the gradients of both factors where they are wanted."""
        for_hidden, for_weight = ctx.needs_input_grad[:2]
        with torch.no_grad():
            dtype = product_dtype(hidden)
            factor = weight.to(dtype)
            wide = torch.promote_types(dtype, torch.float32)
            total = torch.zeros((), dtype=wide, device=hidden.device)
            to_hidden = torch.empty_like(hidden) if for_hidden else None
            to_weight = torch.zeros_like(weight, dtype=wide) if for_weight else None
            for start in range(0, len(hidden), rows):
                chunk, wanted = (
                    hidden[start : start + rows].to(dtype),
                    targets[start : start + rows],
                )
                real = wanted != IGNORE
                index = wanted.masked_fill(~real, 0)[:, None]
                logs = (chunk @ factor.t()).to(wide).log_softmax(-1)
                total -= logs.gather(1, index)[:, 0].masked_fill(~real, 0.0).sum()
                if not (for_hidden or for_weight):
                    continue
                slope = logs.exp_().scatter_add_(1, index, logs.new_full(index.shape, -1.0))
                slope = slope.masked_fill_(~real[:, None], 0.0).to(dtype)
                if to_hidden is not None:
                    to_hidden[start : start + rows] = slope @ factor
                if to_weight is not None:
                    if dtype == wide:
                        to_weight.addmm_(slope.t(), chunk)
                    else:
                        to_weight += slope.t() @ chunk
        ctx.save_for_backward(to_hidden, to_weight)
        ctx.weight_dtype = weight.dtype
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, direction: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        """The gradients made on the way forward, scaled."""
        return (*scaled_gradients(ctx, direction), None, None)


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, rows: int | None = None
) -> Tensor:
    """Sum of the cross-entropies of ``hidden @ weight.T`` at ``targets``, in nats.

    Args:
        hidden: [N, D]. weight: [V, D].
        targets: [N] in 0..V-1, or -100 where there is none.
        rows: tokens per chunk; default :func:`chunk_rows`.

    Returns:
        A scalar in float32 or wider. Its gradient can be taken once, not twice over.

    Raises:
        ValueError: not one target for each hidden state.
    """
    hidden, weight = factors_of(hidden, weight, targets)
    rows = chunk_rows(len(weight), hidden.device.type) if rows is None else rows
    return _LinearCrossEntropy.apply(hidden, weight, targets, rows)


def plain_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """The same sum from logits [N, V] that are there already."""
    return F.cross_entropy(logits.float(), targets, ignore_index=IGNORE, reduction="sum")
