"""How tokens leave: coda, head, sampler, and the ends of requests."""

from __future__ import annotations

import time
from functools import partial
from typing import Any

from mor.engine.mirror import Reads
from mor.engine.prompts import score_prompts
from mor.engine.request import Request, Wave
from mor.engine.runner import Runner
from mor.engine.sampler import Choice
from mor.engine.scheduler import Scheduler
from mor.engine.stats import EngineStats


class Leaving:
    """What becomes of waves that are through with the recursions.

    Args:
        scheduler: who is where.
        runner: of the stages.
        reads: what is asked of the device.
        stats: counters.
    """

    def __init__(
        self, scheduler: Scheduler, runner: Runner, reads: Reads, stats: EngineStats
    ) -> None:
        self.scheduler, self.runner, self.reads, self.stats = scheduler, runner, reads, stats
        self._touched: dict[str, None] = {}

    def leave(self, waves: list[Wave]) -> None:
        """Coda for all of them; head and sampler where a wave was the last of its tokens."""
        logits, hidden = self.runner.leave(waves)
        score_prompts(waves, hidden, self.runner.model.head)
        self.stats.note_gathered([wave.depths for wave in waves])
        ending = [wave.request for wave in waves if wave.end == len(wave.request.tokens)]
        for wave in waves:
            self.scheduler.note_left(wave)
        for request in [request for request in ending if not request.max_new]:
            self.end(request, "length")
            self._touched[request.group] = None
        if logits is not None:
            choice = self.runner.choose(logits, [request for request in ending if request.max_new])
            self.reads.ask(choice.answers, partial(self._take, choice))

    def _take(self, choice: Choice, *answers: list[Any]) -> None:
        """Tokens that were chosen, now that they are read."""
        now, stats = time.perf_counter(), self.stats
        for request, token, likely in zip(choice.requests, *choice.told(*answers), strict=True):
            if request.finished:  # given up in the meantime
                continue
            self._touched[request.group] = None
            stats.new_depths[request.take(token, now, likely)] += 1
            stats.sampled += 1
            if (reason := request.end_reason()) is not None:
                self.end(request, reason)

    def end(self, request: Request, reason: str) -> None:
        """``request`` is over, and holds nothing any more."""
        self.scheduler.drop(request)
        request.finish_reason, request.ended = reason, time.perf_counter()
        self.stats.aborted += reason == "abort"
        self.stats.finished += reason != "abort"

    def touched(self) -> dict[str, None]:
        """Groups with new tokens or ends since the last call."""
        found, self._touched = self._touched, {}
        return found
