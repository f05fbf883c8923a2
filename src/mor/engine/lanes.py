"""Where tokens in flight keep their stream between two ticks."""

from __future__ import annotations

import torch
from torch import Tensor

from mor.model.routers.base import Router, Scores


class Lanes:
    """One lane per token in flight: its stream, and what the router said about it.

    Allocated once; a tick reads the lanes of its tokens and writes them back.

    Attributes:
        count: lanes; behind them is a spare one, for padding.
        hidden: [lanes + 1, W] what is carried between recursions; W is D without a seam.
        origin: [lanes + 1, W] the same before depth 0, where ``keep_origin`` says so.
    """

    def __init__(
        self,
        count: int,
        width: int,
        dtype: torch.dtype,
        device: torch.device,
        router: Router,
        keep_origin: bool,
    ) -> None:
        self.count, self.device, self.carried = count, device, router.carried
        self.hidden = torch.zeros((count + 1, width), dtype=dtype, device=device)
        self.origin = torch.zeros_like(self.hidden) if keep_origin else self.hidden
        self._scores: dict[str, Tensor] = {}
        self._free = list(range(count - 1, -1, -1))

    @property
    def free(self) -> int:
        """Lanes that no token is in."""
        return len(self._free)

    def take(self, count: int) -> list[int]:
        """Take ``count`` free lanes."""
        if count > len(self._free):
            raise RuntimeError(f"{count} lanes wanted, {len(self._free)} are free")
        if count == 1:  # nearly always
            return [self._free.pop()]
        return [self._free.pop() for _ in range(count)]

    def give(self, lanes: list[int]) -> None:
        """Give ``lanes`` back to the free ones."""
        self._free.extend(lanes)

    def gates(self) -> Tensor | None:
        """[lanes + 1] float32 gates of the tokens' last scores; None where the router has none."""
        if "gate" not in self.carried:
            return None
        if "gate" not in self._scores:
            self._scores["gate"] = torch.zeros(
                self.count + 1, dtype=torch.float32, device=self.device
            )
        return self._scores["gate"]

    def put_scores(self, lanes: Tensor, scores: Scores) -> None:
        """Keep what is needed of the scores [1, N, ...] of the tokens in ``lanes`` [N]."""
        for name in self.carried:
            values = getattr(scores, name)
            if values is None:
                continue
            if name not in self._scores:
                shape = (self.count + 1, *values.shape[2:])
                self._scores[name] = torch.zeros(shape, dtype=values.dtype, device=self.device)
            self._scores[name].index_copy_(0, lanes, values[0])

    def scores(self, lanes: Tensor) -> Scores:
        """The scores kept for the tokens in ``lanes`` [N], as [1, N, ...]."""
        kept = self._scores.items()
        return Scores(**{name: values.index_select(0, lanes)[None] for name, values in kept})
