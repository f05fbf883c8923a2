"""Router boundaries of single requests: a capacity chosen when serving, not when training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from mor.engine.mirror import to_device, to_int64
from mor.engine.request import Wave
from mor.model.routers.base import Scores


class OwnBoundaries:
    """Which tokens in flight have boundaries of their own; nothing is kept until one has.

    ``router.decide`` stays the only rule: the score of such a token is moved to plus or minus
    infinity, by its own boundary, and then compared as always.

    Args:
        lanes: places for tokens in flight.
        recursions: R.
    """

    def __init__(self, lanes: int, recursions: int) -> None:
        self.shape = lanes, recursions
        self._own: Tensor | None = None  # [lanes, R], NaN where a token has none
        self._set: set[int] = set()  # lanes that hold some

    def keep_always(self, device: torch.device) -> None:
        """Have a place for them from the start, which captured stages look into."""
        self._own = torch.full(self.shape, torch.nan, dtype=torch.float64, device=device)

    @property
    def none(self) -> bool:
        """Whether no lane holds some, so that nobody has to judge."""
        return not self._set

    def enter(self, waves: Sequence[Wave], device: torch.device) -> None:
        """Note what the requests of new tokens ask for."""
        asking = [wave for wave in waves if wave.request.params.boundaries]
        if not (asking or self._set):
            return  # nearly always
        asked = {lane for wave in asking for lane in wave.lanes}
        if not asked and self._set.isdisjoint(lane for wave in waves for lane in wave.lanes):
            return
        if self._own is None:
            self.keep_always(device)
        assert self._own is not None
        none = [torch.nan] * self.shape[1]
        rows = [list(wave.request.params.boundaries or none) for wave in waves for _ in wave.lanes]
        lanes = [lane for wave in waves for lane in wave.lanes]
        self._own[to_int64(lanes, device)] = to_device(np.array(rows, dtype=np.float64), device)
        self._set = (self._set - set(lanes)) | asked

    def judge(self, scores: Scores, lanes: Tensor, depths: Tensor) -> Scores:
        """Scores [1, N] of the tokens in ``lanes`` [N] for ``decide`` at ``depths`` [1, N]."""
        if self._own is None or scores.decision is None:
            return scores
        own = self._own[lanes[None], depths]
        judged = torch.where(scores.decision > own, torch.inf, -torch.inf)
        return replace(scores, decision=torch.where(own.isnan(), scores.decision, judged))
