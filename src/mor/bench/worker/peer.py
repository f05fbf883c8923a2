"""What every peer is, and what is noted of a request."""

from __future__ import annotations

import importlib
import sys
import time
from collections import deque
from importlib import metadata
from typing import Any

clock = time.perf_counter


def library(name: str) -> Any:
    """Import what only the peer's environment has."""
    return importlib.import_module(name)


def versions(*names: str) -> dict[str, str]:
    """Versions of the packages that are there."""
    found = {"python": sys.version.split()[0]}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


class Trace:
    """When a request was sent, and each of its tokens."""

    def __init__(self, request: dict[str, Any]) -> None:
        self.prompt: list[int] = request["prompt"]
        self.new_tokens: int = request["new_tokens"]
        self.sent = 0.0
        self.times: list[float] = []
        self.tokens: list[int] = []

    def got(self, tokens: list[int]) -> None:
        """Note that so many new tokens have come now."""
        self.times += [clock()] * len(tokens)
        self.tokens += tokens

    def as_json(self) -> dict[str, Any]:
        """The trace as a JSON object."""
        return {"sent": self.sent, "times": self.times, "tokens": self.tokens}


class Peer:
    """What runs a model. Subclasses load it, and either step or run a whole load."""

    details: dict[str, Any]
    versions: dict[str, str]

    def run(self, traces: list[Trace], concurrency: int) -> None:
        """Closed loop over :meth:`add` and :meth:`step`."""
        waiting, running = deque(enumerate(traces)), 0
        while waiting or running:
            while waiting and running < concurrency:
                number, trace = waiting.popleft()
                trace.sent = clock()
                self.add(number, trace)
                running += 1
            running -= self.step()

    def add(self, number: int, trace: Trace) -> None:
        """Send a request."""
        raise NotImplementedError

    def step(self) -> int:
        """Do some work; how many requests ended."""
        raise NotImplementedError
