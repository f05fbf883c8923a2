"""Routers that compare a score with a boundary: expert choice and threshold."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from mor.config import MoRConfig
from mor.model.routers.base import Candidates, Router, Scores
from mor.model.routers.net import RouterNet
from mor.model.routers.quantile import boundary_over_ranks
from mor.model.routers.selection import (
    as_mask,
    batch_boundary,
    count_top_k,
    masked_mean,
    top_k_rows,
)
from mor.model.routers.tables import constant
from mor.ops import native, pointwise
from mor.ops.ranks import all_reduce_mean, is_distributed, sum_over_ranks


class BoundaryRouter(Router):
    """Base of expert choice and threshold: one score per depth, compared with a stored boundary.

    ``boundary[r]`` (logit units) is a running mean over training steps of the value that lets the
    selected share of a batch's candidates through depth r. It is kept in the checkpoint and is all
    that ``decide`` knows about other tokens. Before any training it is the paper's 0.5 rule.
    """

    has_objective = False
    repeats = True
    boundary: Tensor
    boundary_steps: Tensor

    def __init__(self, config: MoRConfig) -> None:
        super().__init__(config)
        self.net = RouterNet(config, config.num_recursions, 1)
        auxiliary = config.router_objective == "aux_router" and self.has_objective
        self.auxiliary = RouterNet(config, config.num_recursions, 1) if auxiliary else None
        self.register_buffer("boundary", torch.full((config.num_recursions,), self.half_rule))
        self.register_buffer("boundary_steps", torch.zeros(config.num_recursions))

    @property
    def half_rule(self) -> float:
        """The paper's 0.5 rule in logit units: sigmoid 0.5 and tanh 0 are logit 0; bare is 0.5."""
        return 0.5 if self.config.router_activation == "none" else 0.0

    def set_confidence(self, confidence: float) -> None:
        """Let tokens go on where a router taught by gains is surer than ``confidence`` in (0, 1).

        One boundary for all depths, so a model that :mod:`mor.train.uptrain.gain` trained can be
        made to spend more or less without data.
        """
        self.boundary.fill_(math.log(confidence / (1 - confidence)))
        self.boundary_steps.fill_(1)

    def gate(self, logits: Tensor) -> Tensor:
        """sigmoid or tanh times alpha, or the bare logit (paper, router table).

        ``router_gate_bias`` is added first; boundaries know nothing of it.
        """
        kind, bias = self.config.router_activation, self.config.router_gate_bias
        logits = logits + bias if bias else logits
        if kind == "none":
            return logits
        squash = pointwise.sigmoid if kind == "sigmoid" else pointwise.tanh
        return squash(logits) * self.config.router_alpha

    def score(
        self, hidden: Tensor, depth: int | Tensor, positions: Tensor, started: Scores | None
    ) -> Scores:
        """One logit per token from the raw stream (no norm), by the network of this depth."""
        logits = self.net(self.read(hidden), depth).squeeze(-1)
        decision = logits
        if self.auxiliary is not None:
            decision = self.auxiliary(hidden.detach(), depth).squeeze(-1)
        return Scores(self.gate(logits), logits, decision)

    def decide(self, scores: Scores, depth: int | Tensor) -> Tensor | None:
        """Above the stored boundary, or the paper's 0.5 rule; a full capacity lets all through."""
        full = self.lets_all_through(depth)
        if full is True:
            return None
        assert scores.decision is not None
        if self.config.router_decision_rule == "half":
            return (scores.decision >= self.half_rule) | full
        return (scores.decision > self.boundary[depth]) | full

    def kernel_answers(self) -> native.RouterAnswers | None:
        """What a kernel has to know to give :meth:`answer`; None where scores are not linear."""
        net, config = self.net, self.config
        if net.up is not None or net.temperature != 1 or self.auxiliary is not None:
            return None
        device = self.boundary.device
        full = constant(tuple(c >= 1 for c in config.router_capacities), torch.bool, device)
        half, squash = config.router_decision_rule == "half", config.router_activation
        halves = (self.half_rule,) * self.num_recursions
        boundary = constant(halves, self.boundary.dtype, device) if half else self.boundary
        return native.RouterAnswers(
            net.weight, net.bias, boundary, full, half, None if squash == "none" else squash,
            config.router_gate_bias, config.router_alpha,
        )  # fmt: skip

    def answer(
        self, hidden: Tensor, depth: int | Tensor, positions: Tensor, started: Scores | None
    ) -> tuple[Scores, Tensor | None]:
        """As the base's, for linear scores in one kernel."""
        possible = isinstance(depth, Tensor) and native.fits(hidden, self.net.weight, self.boundary)
        asked = self.kernel_answers() if possible else None
        if asked is None:
            return super().answer(hidden, depth, positions, started)
        assert isinstance(depth, Tensor)
        found = native.route(hidden.flatten(0, -2), depth.flatten(), asked)
        logits, gates, goes = (part.view(depth.shape) for part in found)
        return Scores(gates, logits, logits), goes

    def observe(
        self, scores: Scores, active: Tensor | None, depth: int, candidates: Candidates
    ) -> None:
        """Note the value that separates as many of this batch's candidates as were selected.

        The batch is that of all ranks, so that what is stored does not depend on their number.
        """
        if active is None or scores.decision is None:
            return
        values = scores.decision.detach()
        valid = candidates.valid
        kept = as_mask(active, values, valid).sum()
        if self.over_ranks:
            (kept,) = sum_over_ranks(kept, like=values)
        self.noted.append((depth, self._boundary_of(values, kept, valid)))

    def _boundary_of(self, values: Tensor, kept: Tensor, valid: Tensor | None) -> Tensor:
        """:func:`batch_boundary`, over the candidates of all ranks where they train along."""
        separate = boundary_over_ranks if self.over_ranks else batch_boundary
        return separate(values, kept, valid)

    def finish_step(self) -> None:
        """Running mean: plain at first, then with ``router_boundary_momentum``."""
        for depth in range(self.num_recursions):
            seen = [value for at, value in self.noted if at == depth]
            if not seen and not is_distributed():
                continue
            zero = torch.zeros((), device=self.boundary.device)
            total = torch.stack(seen).sum() if seen else zero
            value = all_reduce_mean(total, zero + len(seen))
            # By tensors: asking whether the value is a number would wait for the device, per depth.
            steps, old, counts = self.boundary_steps[depth], self.boundary[depth], value.isfinite()
            keep = (steps.double() / (steps.double() + 1)).clamp(
                max=self.config.router_boundary_momentum
            )
            new = keep.to(old.dtype) * old + (1 - keep).to(value.dtype) * value
            self.boundary[depth] = torch.where(counts, new, old)
            self.boundary_steps[depth] += counts
        self.noted.clear()


class ExpertChoiceRouter(BoundaryRouter):
    """Top-k per sequence and depth among the tokens of the previous depth (paper 2.2.1).

    Looks ahead: whether a token is in the top-k depends on the whole sequence. The auxiliary loss
    (or a second, auxiliary router on the detached stream) teaches scores to tell on their own.
    """

    looks_ahead = True
    selects_in_rows = True
    has_objective = True

    def select(self, scores: Scores, depth: int, candidates: Candidates) -> Tensor | None:
        """``max(1, trunc(capacity x tokens of the row))`` largest logits."""
        assert scores.logits is not None
        return top_k_rows(scores.logits, self.capacity(depth), candidates.valid, candidates.lengths)

    def bounds(
        self, started: Scores | None, lengths: Sequence[int], max_depth: int
    ) -> list[int] | None:
        """Exactly how many there are: lengths of rows and capacities say so."""
        return count_top_k([self.capacity(depth) for depth in range(max_depth)], lengths)

    def losses(
        self, scores: Scores, active: Tensor | None, depth: int, candidates: Candidates
    ) -> dict[str, Tensor]:
        """Binary cross-entropy of logits against the selection, mean over candidates; z-loss."""
        assert scores.logits is not None
        assert scores.decision is not None
        terms, valid = {}, candidates.valid
        target = as_mask(active, scores.logits, valid).float()
        name = {"aux_loss": "aux_loss", "aux_router": "aux_router_loss"}.get(
            self.config.router_objective
        )
        if name is not None:
            error = F.binary_cross_entropy_with_logits(scores.decision, target, reduction="none")
            terms[name] = masked_mean(error, valid)
        if self.config.router_z_loss_coef:
            terms["z_loss"] = masked_mean(scores.logits.square(), valid)
        return terms


class ThresholdRouter(BoundaryRouter):
    """Select by the quantile of the scores over the whole batch; decide by its running estimate.

    Training and decoding follow the same rule up to the noise of one batch, so scores need not be
    pushed to 0 and 1, no auxiliary loss is needed, and capacity can be changed after training by
    recalibrating the boundary. The batch quantile itself still looks ahead.
    """

    looks_ahead = True
    ignores_rows = True

    def bounds(
        self, started: Scores | None, lengths: Sequence[int], max_depth: int
    ) -> list[int] | None:
        """The share of each depth: equal scores at the boundary make it less, never more."""
        if self.over_ranks:
            return None
        total = sum(lengths)
        shares = [max(1, round(self.capacity(depth) * total)) for depth in range(max_depth)]
        return [min(total, *shares[: depth + 1]) for depth in range(max_depth)]

    def select(self, scores: Scores, depth: int, candidates: Candidates) -> Tensor | None:
        """The ``capacity x tokens of the batch`` largest scores, wherever they stand.

        The batch is the micro-batch of all ranks together.
        """
        capacity = self.capacity(depth)
        if capacity >= 1:
            return None
        values = scores.decision
        assert values is not None
        values, valid, total = values.detach(), candidates.valid, candidates.total
        number: Tensor | int = values.numel() if valid is None else valid.sum()
        if self.over_ranks:
            total, number = sum_over_ranks(total, number, like=values)
        # Filled, not copied: a copy from the host cannot be part of a CUDA graph.
        share = total * torch.full((), capacity, dtype=torch.float64, device=values.device)
        kept = share.round().long().clamp(min=1).clamp(max=number)
        mask = values > self._boundary_of(values, kept, valid)
        return mask if valid is None else mask & valid

    def losses(
        self, scores: Scores, active: Tensor | None, depth: int, candidates: Candidates
    ) -> dict[str, Tensor]:
        """None are needed; the z-loss is there for those who want it."""
        if not self.config.router_z_loss_coef:
            return {}
        assert scores.logits is not None
        squares, valid = scores.logits.square(), candidates.valid
        if not self.over_ranks:
            return {"z_loss": masked_mean(squares, valid)}
        # Ranks hold unequally many candidates: this is their share of the mean over all of them.
        if valid is not None:
            squares = torch.where(valid, squares, 0.0)
        number = squares.numel() if valid is None else valid.sum()
        (number,) = sum_over_ranks(number, like=squares)
        ranks = torch.distributed.get_world_size()
        return {"z_loss": squares.sum() * ranks / number.clamp(min=1)}
