"""A peer without a model, for tests of the protocol."""

from __future__ import annotations

import time
from typing import Any

from .peer import Peer, Trace, versions


class Fake(Peer):
    """For tests of the protocol: token i of a prompt is its first id plus i; no model at all."""

    def __init__(self, order: dict[str, Any]) -> None:
        if order["variant"] == "broken":
            raise RuntimeError("this peer does not load")
        self.wrong = order["variant"] == "wrong"
        self.versions = versions()
        self.details = {"max_num_seqs": order["max_num_seqs"]}
        self.open: list[Trace] = []

    def add(self, number: int, trace: Trace) -> None:
        """Nothing to do but remember."""
        self.open.append(trace)

    def step(self) -> int:
        """One token for each."""
        time.sleep(1e-4)
        for trace in self.open:
            trace.got([trace.prompt[0] + len(trace.tokens) + self.wrong])
        ended = [trace for trace in self.open if len(trace.tokens) == trace.new_tokens]
        self.open = [trace for trace in self.open if trace not in ended]
        return len(ended)
