"""Stages over buffers that stay where they are, at a few padded sizes, captured once.

What differs from call to call lies in one buffer of whole numbers per size, a column per token:
where its stream is kept, its depth, which pages it reads. On CUDA a stage is captured as a graph
and replayed. Elsewhere :class:`Recorded` replays the same function over the same buffers, with a
graph's habits: what it gives lies always in the same place, so that the next replay writes over it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from mor.engine.mirror import to_device


class Recorded:
    """What a graph does, without one.

    Args:
        function: reads and writes tensors that stay; gives a tensor of one shape.
    """

    def __init__(self, function: Callable[[], Tensor]) -> None:
        self.function, self.found = function, function()

    def __call__(self) -> Tensor:
        """Run it over what lies in its tensors now."""
        return self.found.copy_(self.function())


class Captured:
    """A CUDA graph. Nothing else may run on the device while it is made.

    Args:
        function: as of :class:`Recorded`.
    """

    def __init__(self, function: Callable[[], Tensor]) -> None:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # libraries set themselves up at the first call
            function()
        torch.cuda.current_stream().wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.found = function()

    def __call__(self) -> Tensor:
        """Run it over what lies in its tensors now."""
        self.graph.replay()
        return self.found


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
        self._made: dict[int, tuple[Tensor, Recorded | Captured]] = {}

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
            make = Captured if self.device.type == "cuda" else Recorded
            self._made[size] = buffer, make(lambda: self.function(buffer))
        buffer, replay = self._made[size]
        padded = self.idle.repeat(size, 1)
        padded[:, :count] = columns
        buffer.copy_(to_device(padded, self.device))
        return replay()[:count]
