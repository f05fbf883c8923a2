"""What every router is: score, select for training, decide causally, update the stream.

A router answers one question for one token at one depth: does it run recursion ``depth``?
``select`` answers it the way training does (it may compare tokens). ``decide`` answers it from
that token's own state and constants stored in the checkpoint, and nothing else: it is the rule of
evaluation, ``generate`` and the engine. What ``decide`` needs (``start``, ``score``, ``decide``,
``update``) also takes a depth per token, since the engine runs tokens of all depths together.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from mor.config import MoRConfig
from mor.model.routers.tables import constant, warm_capacity
from mor.model.routers.updates import update_stream
from mor.model.wide import StaysWide, widen_buffers
from mor.ops.compaction import Packing
from mor.ops.ranks import is_distributed


@dataclass(frozen=True)
class Scores:
    """What a router knows about some tokens at one depth; every tensor has the tokens' shape.

    Attributes:
        gate: weight of the block's output in the update; None means 1.
        logits: raw router outputs, None where the router has none.
        decision: what ``decide`` compares with the stored boundary (``logits`` unless an
            auxiliary router decides).
        choice: last depth a token will run, for routers that choose once at the start.
    """

    gate: Tensor | None = None
    logits: Tensor | None = None
    decision: Tensor | None = None
    choice: Tensor | None = None

    def take(self, packing: Packing) -> Scores:
        """The same for the tokens of ``packing``."""
        return self.map(packing.gather)

    def detach(self) -> Scores:
        """The same, cut from the graph."""
        return self.map(Tensor.detach)

    def map(self, change: Callable[[Tensor], Tensor]) -> Scores:
        """``change`` done to every tensor there is."""
        parts = {name: getattr(self, name) for name in ("gate", "logits", "decision", "choice")}
        return replace(self, **{k: None if v is None else change(v) for k, v in parts.items()})


@dataclass(frozen=True)
class Candidates:
    """The tokens that may run a depth: those that ran the depth before, as rows [A, M].

    Attributes:
        valid: bool [A, M] which places hold a candidate; None when all do.
        lengths: tokens of each row [A], or one number for all: what a capacity is a share of.
        total: tokens of the whole batch, rows without a candidate included.
    """

    valid: Tensor | None
    lengths: Tensor | int
    total: Tensor | int


class Router(StaysWide):
    """Base of all routers. Subclasses override what differs.

    It stays in float32 where the model is narrowed: see :mod:`mor.model.wide`.

    Attributes:
        step: the trainer's optimiser step, from :meth:`begin_step`; warm-ups are functions of it,
            so that resuming needs no counter of our own.
        selects_in_rows: whether ``select`` compares tokens of a row alone, as an encoder may too.
        ignores_rows: whether ``select`` says the same however the tokens are laid.
        returns_to_origin: whether ``update`` needs the stream before depth 0.
        chooses_once: whether ``start`` says all, before depth 0.
        carried: fields of the scores that ``update``, and ``score`` at the next depth, look at.
        looks_ahead: whether ``select`` compares a token with later ones, so that any number taken
            with it is not causal.
        repeats: whether training passes of one shape and capacities can be recorded and replayed.
        noted: depth and number of all that ``observe`` noted since :meth:`finish_step`.
        lockstep: whether every rank runs every depth in evaluation too, from
            :meth:`run_every_depth`.
        micro_batches, loss_scale, loss_elsewhere: of the optimiser step, from :meth:`begin_step`.
            Only a trainer that takes the loss from hidden states or logits needs them: see
            :mod:`mor.hf.backbone`.
    """

    stays_wide = True
    chooses_once = False
    carried: tuple[str, ...] = ("gate",)
    looks_ahead = False
    repeats = False
    selects_in_rows = False
    ignores_rows = False
    returns_to_origin = False

    def __init__(self, config: MoRConfig) -> None:
        super().__init__()
        self.config = config
        self.num_recursions = config.num_recursions
        self.step = 0
        self.micro_batches = 1
        self.loss_scale = 1.0
        self.loss_elsewhere = False
        self.lockstep = False
        self.noted: list[tuple[int, Tensor]] = []

    @property
    def starts_all(self) -> bool:
        """Whether ``decide`` lets every token run depth 0, so that nobody has to ask."""
        return self.chooses_once or self.lets_all_through(0) is True

    @property
    def in_step(self) -> bool:
        """Whether this pass must meet the other ranks at every depth, with or without a token."""
        return self.lockstep or self.over_ranks

    @property
    def over_ranks(self) -> bool:
        """Whether batch statistics are those of all ranks: in training, where ranks train along."""
        return self.training and is_distributed()

    @property
    def frozen(self) -> bool:
        """Whether nothing of it is trained. Its stored constants stay then as they are, too.

        An adapter beside a frozen router (LoRA) holds none: constants that moved would be lost.
        """
        parameters = list(self.parameters())
        return bool(parameters) and not any(p.requires_grad for p in parameters)

    def begin_step(
        self,
        step: int,
        micro_batches: int = 1,
        loss_scale: float = 1.0,
        loss_elsewhere: bool = False,
    ) -> None:
        """Start an optimiser step. A training loop calls this first and :meth:`finish_step` last.

        Args:
            step: optimiser steps that were done before. micro_batches: forward passes of this one.
            loss_scale: what float16 training multiplies losses by.
            loss_elsewhere: whether the trainer takes the loss from logits.
        """
        self.step, self.micro_batches = step, micro_batches
        self.loss_scale, self.loss_elsewhere = loss_scale, loss_elsewhere
        widen_buffers(self)

    def run_every_depth(self) -> None:
        """Run every depth in evaluation too: other ranks wait there for weights to be gathered."""
        self.lockstep = True

    def start(self, hidden: Tensor, max_depth: int | Tensor) -> Scores | None:
        """Choose once for tokens [..., D] before depth 0, with one cap or a cap per token [...].

        None for routers that ask at each depth.
        """
        return None

    def score(
        self, hidden: Tensor, depth: int | Tensor, positions: Tensor, started: Scores | None
    ) -> Scores:
        """Scores of tokens [..., D] that may run recursion ``depth``.

        Args:
            hidden: [..., D] the residual stream.
            depth: 0-based, one for all tokens or one per token [...].
            positions: [...] of these tokens. started: what :meth:`start` said about them.
        """
        raise NotImplementedError

    def select(self, scores: Scores, depth: int, candidates: Candidates) -> Tensor | None:
        """Training's rule for candidates [A, M].

        Args:
            scores: of the candidates.
            depth: 0-based.
            candidates: which places hold one, and what capacities refer to.

        Returns:
            A bool mask [A, M], ascending indices [A, k] (long), or None for all candidates.
        """
        raise NotImplementedError

    def bounds(
        self, started: Scores | None, lengths: Sequence[int], max_depth: int
    ) -> list[int] | None:
        """How many tokens ``select`` lets run each depth, at most; None where nobody can know.

        Only a router that answers with masks is asked.

        Args:
            started: what :meth:`start` said. max_depth: depth cap.
            lengths: tokens of each row, or of the whole batch for one that ``ignores_rows``.
        """
        return None

    def decide(self, scores: Scores, depth: int | Tensor) -> Tensor | None:
        """The causal rule: bool [...] which tokens run recursion ``depth``; None for all.

        Each answer depends on that token's scores and on stored constants only.
        """
        raise NotImplementedError

    def answer(
        self, hidden: Tensor, depth: int | Tensor, positions: Tensor, started: Scores | None
    ) -> tuple[Scores, Tensor | None]:
        """:meth:`score`, and what :meth:`decide` says of it; a router may do both in one call."""
        return (scores := self.score(hidden, depth, positions, started)), self.decide(scores, depth)

    def update(
        self, hidden: Tensor, output: Tensor, origin: Tensor, scores: Scores, depth: int | Tensor
    ) -> Tensor:
        """New stream [..., D] from a token's stream, the block's output and its scores.

        ``origin``, the stream before depth 0, is read where the router ``returns_to_origin``.
        """
        return self.combine(hidden, output, scores.gate)

    def read(self, hidden: Tensor) -> Tensor:
        """The stream [..., D] as the networks see it: without a way back under ``last``.

        What trains the stream is then what would train it in a plain recursive model.
        """
        return hidden.detach() if self.config.update_rule == "last" else hidden

    def combine(self, base: Tensor, output: Tensor, gate: Tensor | None) -> Tensor:
        """:func:`~mor.model.routers.updates.update_stream` by the configuration's rule."""
        return update_stream(self.config.update_rule, base, output, gate)

    def losses(
        self, scores: Scores, active: Tensor | None, depth: int, candidates: Candidates
    ) -> dict[str, Tensor]:
        """Unweighted loss terms of this depth, by name; terms of all depths are added up."""
        return {}

    def observe(
        self, scores: Scores, active: Tensor | None, depth: int, candidates: Candidates
    ) -> None:
        """Take note of a training batch, for :meth:`finish_step`."""

    def finish_step(self) -> None:
        """Fold what was observed since the last call into the stored constants.

        Called once per optimiser step; averages over ranks where torch.distributed runs.
        """

    def loss_weight(self, name: str) -> float:
        """Coefficient of loss term ``name`` in the total."""
        config = self.config
        weights = {"aux_loss": config.router_aux_loss_coef, "aux_router_loss": 1.0,
                   "balancing_loss": config.router_balancing_loss_coef,
                   "z_loss": config.router_z_loss_coef}  # fmt: skip
        return weights[name]

    def per_depth(self, values: list[float], depth: int | Tensor) -> float | Tensor:
        """``values[depth]``; for a depth per token in float32, as a number meets float32 scores."""
        if isinstance(depth, int):
            return values[depth]
        return constant(tuple(values), torch.float32, depth.device)[depth]

    def lets_all_through(self, depth: int | Tensor) -> bool | Tensor:
        """Whether ``depth`` has a full capacity, so that ``decide`` need not look."""
        full = [capacity >= 1 for capacity in self.config.router_capacities]
        if isinstance(depth, int):
            return full[depth]
        return constant(tuple(full), torch.bool, depth.device)[depth]

    def capacity(self, depth: int) -> float:
        """Fraction of all tokens that training lets run ``depth``, warm-up included."""
        final = self.config.router_capacities[depth]
        if not self.training:
            return final
        return warm_capacity(final, self.step, self.config.router_capacity_warmup_steps)


def active_router(module: nn.Module) -> Router:
    """The router that is in use: ``module`` itself, or what PEFT's ``modules_to_save`` trains.

    PEFT puts a wrapper in the router's place, which holds the router as it was and a copy for each
    adapter. The wrapper passes on attributes, but has an ``update`` of its own.
    """
    if isinstance(module, Router):
        return module
    wrapper: Any = module
    active = [] if wrapper.disable_adapters else wrapper.active_adapters
    trained = [name for name in active if name in wrapper.modules_to_save]
    chosen = wrapper.modules_to_save[trained[0]] if trained else wrapper.original_module
    assert isinstance(chosen, Router)
    return chosen
