"""Cross-entropy and distillation of logits in one pass over the vocabulary, a chunk at a time.

For student logits z and teacher probabilities p, both at temperature t, the loss of a token is

    lm x cross-entropy(z, target) + kd x t^2 x KL(p || softmax(z / t))

Where only the teacher's ``k`` largest probabilities are known, what is left of either distribution
counts as one outcome more. The factor t^2 keeps the gradient's size (arXiv 1503.02531). As in
:mod:`mor.ops.cross_entropy` the logits of a chunk are turned into their gradient and are gone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mor.ops.cross_entropy import (
    IGNORE,
    chunk_rows,
    factors_of,
    product_dtype,
    scaled_gradients,
)


class TeacherRows(Protocol):
    """What a teacher says about N tokens."""

    def logs(self, start: int, stop: int) -> tuple[Tensor | None, Tensor]:
        """Ids [n, k] (None: all of the vocabulary, in order) and their log-probabilities [n, k]."""
        ...


@dataclass(frozen=True)
class LiveRows:
    """Log-probabilities made when they are asked for.

    Attributes:
        hidden: [N, D] after the teacher's final norm.
        weight: [V, D] of its head.
        temperature: of the softmax.
        top_k: how many are given; None for all.
    """

    hidden: Tensor
    weight: Tensor
    temperature: float = 1.0
    top_k: int | None = None

    def logs(self, start: int, stop: int) -> tuple[Tensor | None, Tensor]:
        """See :class:`TeacherRows`."""
        with torch.no_grad():
            logits = (self.hidden[start:stop] @ self.weight.to(self.hidden.dtype).t()).float()
            logs = (logits / self.temperature).log_softmax(-1)
            if self.top_k is None:
                return None, logs
            found = logs.topk(self.top_k, -1)
            return found.indices, found.values


@dataclass(frozen=True)
class KnownRows:
    """Log-probabilities that were kept: ids and values, each [N, k]."""

    ids: Tensor
    values: Tensor

    def logs(self, start: int, stop: int) -> tuple[Tensor | None, Tensor]:
        """See :class:`TeacherRows`."""
        return self.ids[start:stop].long(), self.values[start:stop].float()


def divergence(logs: Tensor, ids: Tensor | None, known: Tensor) -> tuple[Tensor, Tensor]:
    """KL(teacher || student) of each row [n], and its slope by the student's logits [n, V].

    Args:
        logs: [n, V] log-probabilities of the student.
        ids, known: of the teacher, as :meth:`TeacherRows.logs` gives them.
    """
    if ids is None:
        p = known.exp()
        return (p * (known - logs)).sum(-1), logs.exp() - p
    p = known.exp()
    of_student = logs.gather(1, ids)
    loss, slope = (p * (known - of_student)).sum(-1), logs.exp()
    if ids.shape[1] < logs.shape[1]:  # else nothing is left out
        rest_p = (1 - p.sum(-1)).clamp(min=0)
        rest_q = logs.scatter(1, ids, float("-inf")).logsumexp(-1)  # no difference of near numbers
        loss += torch.special.xlogy(rest_p, rest_p) - rest_p * rest_q
        # Shares of the rest, each at most 1: 1 / e^rest_q alone may be beyond all numbers.
        slope -= rest_p[:, None] * (logs - rest_q[:, None]).exp()
    return loss, slope.scatter_(1, ids, of_student.exp() - p)


class _LinearDistillation(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        teacher: TeacherRows,
        lm: float,
        kd: float,
        temperature: float,
        rows: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        for_hidden, for_weight = ctx.needs_input_grad[:2]
        with torch.no_grad():
            dtype = product_dtype(hidden)
            factor = weight.to(dtype)
            wide = torch.promote_types(dtype, torch.float32)
            sums = torch.zeros(2, dtype=wide, device=hidden.device)
            to_hidden = torch.empty_like(hidden) if for_hidden else None
            to_weight = torch.zeros_like(weight, dtype=wide) if for_weight else None
            for start in range(0, len(hidden), rows):
                stop = min(len(hidden), start + rows)
                chunk, wanted = hidden[start:stop].to(dtype), targets[start:stop]
                real = wanted != IGNORE
                index = wanted.masked_fill(~real, 0)[:, None]
                logits = (chunk @ factor.t()).to(wide)
                logs = logits.log_softmax(-1)
                sums[0] -= logs.gather(1, index)[:, 0].masked_fill(~real, 0.0).sum()
                soft = logs if temperature == 1 else (logits / temperature).log_softmax(-1)
                ids, known = teacher.logs(start, stop)
                loss, slope = divergence(soft, ids, known.to(wide))
                sums[1] += temperature**2 * loss.masked_fill(~real, 0.0).sum()
                if not (for_hidden or for_weight):
                    continue
                slope *= kd * temperature
                if lm:
                    ones = logs.new_full(index.shape, -lm)
                    slope += logs.exp_().mul_(lm).scatter_add_(1, index, ones)
                slope = slope.masked_fill_(~real[:, None], 0.0).to(dtype)
                if to_hidden is not None:
                    to_hidden[start:stop] = slope @ factor
                if to_weight is not None:
                    to_weight += (slope.t() @ chunk).to(wide)
        ctx.save_for_backward(to_hidden, to_weight)
        ctx.weight_dtype = weight.dtype
        total, (ce, kl) = lm * sums[0] + kd * sums[1], sums.unbind()
        ctx.mark_non_differentiable(ce, kl)
        return total, ce, kl

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, direction: Tensor, *others: Any) -> tuple[Tensor | None, ...]:
        return (*scaled_gradients(ctx, direction), *(None,) * 6)


def linear_distillation(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    teacher: TeacherRows,
    *,
    lm: float,
    kd: float,
    temperature: float = 1.0,
    rows: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Sums over the tokens that have a target: weighted loss, cross-entropy, and t^2 x KL.

    Args:
        hidden: [N, D]. weight: [V, D].
        targets: [N] in 0..V-1, or -100 for a token that does not count.
        teacher: about the same N tokens, at the same temperature.
        lm, kd: weights of the two terms.
        temperature: t.
        rows: tokens per chunk.

    Returns:
        Three scalars; only the first has a gradient, which can be taken once.

    Raises:
        ValueError: not one target for each hidden state.
    """
    hidden, weight = factors_of(hidden, weight, targets)
    rows = chunk_rows(len(weight), hidden.device.type) if rows is None else rows
    return _LinearDistillation.apply(hidden, weight, targets, teacher, lm, kd, temperature, rows)
