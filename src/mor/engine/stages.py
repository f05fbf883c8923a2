"""Stages over buffers that stay where they are, at a few padded sizes, captured once.

What differs from call to call lies in one buffer of whole numbers per size, a column per token:
where its stream is kept, its depth, which pages it reads. See :mod:`mor.ops.replay`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from mor.engine.mirror import to_device
from mor.ops.replay import Replay, record


class Stage:
    """One stage, at every size that was asked for so far.

    Args:
        function: [columns, size] whole numbers -> [size, ...].
        idle: what each column holds for a place that no token is in.
        most: tokens of the largest size.
        device: where it runs.
    """

    def __init__(
        self,
        function: Callable[[Tensor], Tensor],
        idle: Sequence[int],
        most: int,
        device: torch.device,
    ) -> None:
        self.function, self.device, self.most = function, device, most
        self.idle = np.array(idle, dtype=np.int64)[:, None]
        self._made: dict[int, tuple[Tensor, Replay]] = {}

    def size(self, count: int) -> int:
        """The next power of two, or the largest size."""
        return min(1 << (count - 1).bit_length(), self.most)

    def __call__(self, columns: Sequence[Sequence[int]]) -> Tensor:
        """[count, ...] for the tokens of ``columns``, count numbers in each.

        The next call writes over it.
        """
        count = len(columns[0])
        size = self.size(count)
        if size not in self._made:
            buffer = to_device(self.idle.repeat(size, 1), self.device)
            self._made[size] = buffer, record(lambda: (self.function(buffer),), self.device)
        buffer, replay = self._made[size]
        padded = self.idle.repeat(size, 1)
        padded[:, :count] = columns
        buffer.copy_(to_device(padded, self.device))
        return replay()[0][:count]
