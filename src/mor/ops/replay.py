"""A function over tensors that stay where they are, recorded once and run again and again.

On CUDA it is captured as a graph: a replay costs the host one call, however many kernels there are.
Elsewhere :class:`Recorded` runs the function itself with a graph's habits: what it gives lies
always in the same place, so that the next run writes over it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

Function = Callable[[], tuple[Tensor, ...]]
"""Reads and writes tensors that stay; gives tensors of the same shapes each time."""


class Replay(Protocol):
    """A recorded function.

    Attributes:
        found: what it gives; each run writes over it.
    """

    found: tuple[Tensor, ...]

    def __call__(self) -> tuple[Tensor, ...]:
        """Run it over what lies in its tensors now."""


class Recorded:
    """What a graph does, without one."""

    def __init__(self, function: Function) -> None:
        self.function, self.found = function, function()

    def __call__(self) -> tuple[Tensor, ...]:
        """See :class:`Replay`."""
        for place, value in zip(self.found, self.function(), strict=True):
            place.copy_(value)
        return self.found


class Captured:
    """A CUDA graph. Nothing else may run on the device while it is made.

    Args:
        function: as of :class:`Recorded`.
        tries: runs before the capture; libraries set themselves up and kernels are compiled there.
    """

    def __init__(self, function: Function, tries: int = 1) -> None:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(tries):
                function()
        torch.cuda.current_stream().wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.found = function()

    def __call__(self) -> tuple[Tensor, ...]:
        """See :class:`Replay`."""
        self.graph.replay()
        return self.found


def record(function: Function, device: torch.device, tries: int = 1) -> Replay:
    """The function as a graph on CUDA, else run anew each time."""
    return Captured(function, tries) if device.type == "cuda" else Recorded(function)
