"""The controls: every claim about routing needs both beside it."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b

import torch
from torch import Tensor

from mor.config import MoRConfig
from mor.model.routers.base import Candidates, Router, Scores
from mor.model.routers.selection import count_top_k, top_k_rows

# Odd and far above any sequence length, so that rows do not overlap.
_ROW = 1_000_003
_HASH = (0x9E3779B1, 0x85EBCA77, 0xC2B2AE3D)


class FixedRouter(Router):
    """Every token runs the same number of recursions; the block's output replaces the stream."""

    carried = ()
    starts_all = True
    repeats = True
    ignores_rows = True

    def score(
        self, hidden: Tensor, depth: int | Tensor, positions: Tensor, started: Scores | None
    ) -> Scores:
        """Empty scores: depth is the same for all tokens."""
        return Scores()

    def select(self, scores: Scores, depth: int, candidates: Candidates) -> Tensor | None:
        """None, for all tokens: the loop itself ends at the fixed depth."""
        return None

    def decide(self, scores: Scores, depth: int | Tensor) -> Tensor | None:
        """None, for all tokens: the loop itself ends at the fixed depth."""
        return None

    def update(
        self, hidden: Tensor, output: Tensor, origin: Tensor, scores: Scores, depth: int | Tensor
    ) -> Tensor:
        """The plain recursive model: h becomes block(h)."""
        return output


class RandomRouter(Router):
    """Control: uniform random scores at the same capacities (``rand_router`` of the release).

    Training draws anew at each step: a hash of the seed, the step, the token's row in the whole
    optimiser step, and its place. So a run depends neither on how a step is cut into micro-batches
    and ranks, nor on where it was resumed. Otherwise a token's score is a hash of its position, so
    that its route never depends on the batch or on later tokens, and token u runs depth r iff
    u < capacity_r; its gate is spread as the scores of training's winners are.
    """

    looks_ahead = True

    def __init__(self, config: MoRConfig) -> None:
        super().__init__(config)
        self._rows = self._next = 0

    def finish_step(self) -> None:
        """Count rows from the beginning."""
        self._rows = self._next = 0

    def _draw(self, like: Tensor, depth: int) -> Tensor:
        """Uniform numbers for the rows of this rank, [A, M]."""
        rows, width = like.shape
        ranks, rank = 1, 0
        if self.over_ranks:
            ranks, rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
        if depth == 0:
            self._rows, self._next = self._next, self._next + ranks * rows
        first = self._rows + rank * rows
        row = torch.arange(first, first + rows, device=like.device)[:, None]
        place = torch.arange(width, device=like.device)
        numbers = repr((torch.initial_seed(), self.step, depth)).encode()
        salt = int.from_bytes(blake2b(numbers, digest_size=4).digest())
        return self._hash(row * _ROW + place, salt >> 1)

    def score(
        self, hidden: Tensor, depth: int | Tensor, positions: Tensor, started: Scores | None
    ) -> Scores:
        """Uniform scores in [0, 1); the gate is alpha times the score."""
        value = self._hash(positions, 0)
        if self.training and isinstance(depth, int):  # a depth per token is decoding's
            draw = self._draw(positions, depth)
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

    def select(self, scores: Scores, depth: int, candidates: Candidates) -> Tensor | None:
        """Top-k of the random scores per row."""
        assert scores.logits is not None
        return top_k_rows(scores.logits, self.capacity(depth), candidates.valid, candidates.lengths)

    def bounds(
        self, started: Scores | None, lengths: Sequence[int], max_depth: int
    ) -> list[int] | None:
        """Exactly how many there are: lengths of rows and capacities say so."""
        return count_top_k([self.capacity(depth) for depth in range(max_depth)], lengths)

    def decide(self, scores: Scores, depth: int | Tensor) -> Tensor | None:
        """u < capacity."""
        full = self.lets_all_through(depth)
        if full is True:
            return None
        assert scores.decision is not None
        capacity = self.per_depth(self.config.router_capacities, depth)
        return (scores.decision < capacity) | full
