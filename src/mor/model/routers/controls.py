"""The controls: every claim about routing needs both beside it."""

from __future__ import annotations

import torch
from torch import Tensor

from mor.model.router_base import Router, Scores
from mor.model.routers.selection import top_k_rows

_HASH = (0x9E3779B1, 0x85EBCA77, 0xC2B2AE3D)


class FixedRouter(Router):
    """Every token runs the same number of recursions; the block's output replaces the stream."""

    def score(
        self, hidden: Tensor, depth: int | Tensor, positions: Tensor, started: Scores | None
    ) -> Scores:
        """Nothing to know."""
        return Scores()

    def select(
        self,
        scores: Scores,
        depth: int,
        valid: Tensor | None,
        lengths: Tensor | int,
        total: Tensor | int,
    ) -> Tensor | None:
        """All; the loop itself ends at the fixed depth."""
        return None

    def decide(self, scores: Scores, depth: int | Tensor) -> Tensor | None:
        """All; the loop itself ends at the fixed depth."""
        return None

    def update(
        self, hidden: Tensor, output: Tensor, origin: Tensor, scores: Scores, depth: int | Tensor
    ) -> Tensor:
        """The plain recursive model: h becomes block(h)."""
        return output


class RandomRouter(Router):
    """Control: uniform random scores at the same capacities (``rand_router`` of the release).

    Training draws anew at each call. Otherwise a token's score is a hash of its position, so that
    its route never depends on the batch or on later tokens, and token u runs depth r iff
    u < capacity_r; its gate is spread as the scores of training's winners are.
    """

    looks_ahead = True

    def score(
        self, hidden: Tensor, depth: int | Tensor, positions: Tensor, started: Scores | None
    ) -> Scores:
        """Uniform scores in [0, 1); the gate is alpha times the score."""
        value = self._hash(positions, 0)
        if self.training:
            draw = torch.rand(positions.shape, device=positions.device)
            return Scores(self.config.router_alpha * draw, draw, value)
        # The largest x of uniform draws are uniform in [1 - x, 1]; x is the share that goes on.
        capacities = self.config.router_capacities
        shares = [c / before for c, before in zip(capacities, [1.0, *capacities], strict=False)]
        gate = 1 - self.per_depth(shares, depth) * self._hash(positions, depth + 1)
        return Scores(self.config.router_alpha * gate, 1 - value, value)

    @staticmethod
    def _hash(positions: Tensor, salt: int | Tensor) -> Tensor:
        """Uniform in [0, 1) from integers, by multiply-xor-shift mixing in 32 bits."""
        mixed = (positions.long() + 1) * _HASH[0] + salt * _HASH[1]
        for shift, factor in ((15, _HASH[1]), (13, _HASH[2]), (16, 1)):
            mixed = ((mixed ^ ((mixed & 0xFFFFFFFF) >> shift)) * factor) & 0xFFFFFFFF
        return mixed.double().div(2**32).float()

    def select(
        self,
        scores: Scores,
        depth: int,
        valid: Tensor | None,
        lengths: Tensor | int,
        total: Tensor | int,
    ) -> Tensor | None:
        """Top-k of the random scores per row."""
        assert scores.logits is not None
        return top_k_rows(scores.logits, self.capacity(depth), valid, lengths)

    def decide(self, scores: Scores, depth: int | Tensor) -> Tensor | None:
        """u < capacity."""
        full = self.lets_all_through(depth)
        if full is True:
            return None
        assert scores.decision is not None
        capacity = self.per_depth(self.config.router_capacities, depth)
        return (scores.decision < capacity) | full
