"""What a forward pass keeps beside its result: states, traces, and the router's losses."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor

from mor.model.reached import Reached
from mor.model.routers.base import Router, Scores
from mor.model.routers.selection import as_mask
from mor.ops.compaction import Packing


@dataclass
class DepthTrace:
    """What happened at one depth: kept on request, for tests and analysis.

    Attributes:
        scores: of the candidates.
        candidates: their packing within the batch (None: all tokens).
        active: bool mask over the candidates that ran this depth.
    """

    scores: Scores
    candidates: Packing | None
    active: Tensor


class Recorder:
    """Keeps what was asked for while the stages run.

    Args:
        keep_states: keep the stream at the seams of the stages.
        keep_traces: keep a :class:`DepthTrace` per depth that was reached.
        exits: after how many recursions to keep the stream, for :attr:`exits`.
        with_losses: compute the router's losses and let it observe the batch.

    Attributes:
        states: streams [A, N, D] in order; None where they are not kept.
        traces: one per depth.
        losses: router terms by name, summed over depths, not weighted.
        exits: by number of recursions, the stream [A, N, D] after them.
    """

    def __init__(
        self,
        keep_states: bool = False,
        keep_traces: bool = False,
        with_losses: bool = False,
        exits: Collection[int] = (),
    ) -> None:
        self.wanted_exits = frozenset(exits)
        self.exits: dict[int, Tensor] = {}
        self.keep_traces, self.with_losses = keep_traces, with_losses
        self.states: list[Tensor] | None = [] if keep_states else None
        self.traces: list[DepthTrace] = []
        self.losses: dict[str, Tensor] = {}

    def add_state(self, hidden: Tensor) -> None:
        """Keep the stream [A, N, D] at a seam."""
        if self.states is not None:
            self.states.append(hidden)

    def add_pass(self, hidden: Tensor, passes: int) -> None:
        """Keep the stream [A, N, D] after ``passes`` recursions."""
        self.add_state(hidden)
        if passes in self.wanted_exits:
            self.exits[passes] = hidden

    def add_choice(
        self,
        router: Router,
        scores: Scores,
        active: Tensor | None,
        depth: int,
        reached: Reached,
    ) -> None:
        """Take the losses of one depth's choice, and keep its trace.

        Args:
            router: what chose.
            scores: of the candidates [A, M].
            active: its answer, as ``select`` or ``decide`` gave it.
            depth: 0-based.
            reached: the candidates.
        """
        if self.with_losses:
            candidates = reached.candidates()
            if not router.frozen:
                router.observe(scores, active, depth, candidates)
            for name, term in router.losses(scores, active, depth, candidates).items():
                self.losses[name] = self.losses.get(name, 0) + term
        if self.keep_traces:
            # Cut off: DDP would take what is returned for a way to the loss.
            like = torch.empty(reached.shape, device=reached.device)
            active = as_mask(active, like, reached.valid)
            self.traces.append(DepthTrace(scores.detach(), reached.packing, active))
