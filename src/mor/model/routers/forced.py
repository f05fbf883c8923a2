"""The same model with depths that are given: what routes are worth, against routes by chance."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

from torch import Tensor

from mor.model.routers.base import Router, Scores, active_router

if TYPE_CHECKING:  # the model imports its routers
    from mor.model.model import MoRModel


class ForcedDepths(Router):
    """A router that sends every token to a given depth; gates and update are another router's.

    Attributes:
        inner: whose gates and update are used.
        depths: [B, T] recursions of every token, 1..R.
    """

    chooses_once = True

    def __init__(self, inner: Router, depths: Tensor) -> None:
        super().__init__(inner.config)
        self.inner, self.depths = inner, depths
        self.carried = (*inner.carried, "choice")
        self.returns_to_origin = inner.returns_to_origin

    def start(self, hidden: Tensor, max_depth: int | Tensor) -> Scores | None:
        """The given depths, cut at ``max_depth``."""
        if hidden.shape[:2] != self.depths.shape:
            shape = tuple(self.depths.shape)
            raise ValueError(f"depths has shape {shape}; the batch is {tuple(hidden.shape[:2])}")
        choice = (self.depths - 1).clamp(max=max_depth - 1)
        return replace(self.inner.start(hidden, max_depth) or Scores(), choice=choice)

    def score(
        self, hidden: Tensor, depth: int | Tensor, positions: Tensor, started: Scores | None
    ) -> Scores:
        """The other router's scores, with the given depths as the choice."""
        assert started is not None
        if self.inner.chooses_once:
            return started
        return replace(self.inner.score(hidden, depth, positions, None), choice=started.choice)

    def decide(self, scores: Scores, depth: int | Tensor) -> Tensor | None:
        """Whether the given depth is not reached yet."""
        assert scores.choice is not None
        return scores.choice >= depth

    def update(
        self, hidden: Tensor, output: Tensor, origin: Tensor, scores: Scores, depth: int | Tensor
    ) -> Tensor:
        """As the other router."""
        return self.inner.update(hidden, output, origin, scores, depth)


@contextmanager
def forced_depths(network: MoRModel, depths: Tensor) -> Iterator[None]:
    """Send the tokens of a batch without padding or documents to ``depths`` [B, T] for a while."""
    before = network.router
    network.router = ForcedDepths(active_router(before), depths)
    try:
        yield
    finally:
        network.router = before
