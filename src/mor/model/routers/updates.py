"""The update rules: what becomes of the stream after a recursion."""

from __future__ import annotations

import torch
from torch import Tensor

from mor.config.choices import UpdateRule


def update_stream(rule: UpdateRule, base: Tensor, output: Tensor, gate: Tensor | None) -> Tensor:
    """The new stream from the stream h, the block's output y and the gate g.

    ``gated`` h + g y (paper 2.1), ``additive`` h + y, ``residual`` h + g (y - h), ``last`` y. Under
    ``last`` the gate has the gradient that ``residual`` would give it at a gate of 1, so a router
    learns which passes help, and its scores scale nothing.

    Args:
        rule: which of them.
        base: h, [..., D].
        output: y, [..., D].
        gate: g, [...]; None for 1.
    """
    if rule == "additive":
        return base + output
    if rule == "last":
        if gate is None or not (gate.requires_grad and torch.is_grad_enabled()):
            return output
        zero = (gate - gate.detach())[..., None].to(output.dtype)
        return output + zero * (output - base).detach()
    weight = 1.0 if gate is None else gate[..., None].to(output.dtype)
    return base + weight * (output if rule == "gated" else output - base)
