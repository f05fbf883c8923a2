"""How tokens leave: coda, head, sampler, and the ends of requests."""

from __future__ import annotations

import time
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mor.engine.draft import Draft
from mor.engine.mirror import Reads
from mor.engine.outputs import TokenLogprobs
from mor.engine.prompts import score_prompts
from mor.engine.request import Request, Wave
from mor.engine.runner import Runner
from mor.engine.sampler import Choice
from mor.engine.scheduler import Scheduler
from mor.engine.stats import EngineStats
from mor.engine.verify import Check, guess


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
        self.runner.publish(waves=waves)
        logits, hidden = self.runner.leave(waves)
        score_prompts(waves, hidden, self.runner.model.head)
        self.stats.note_gathered([wave.depths for wave in waves if wave.cap is None])
        if logits is not None and any([wave.request.draft is not None for wave in waves]):
            waves, logits = self._settle_drafts(waves, logits)
        ending = [wave.request for wave in waves if wave.end == len(wave.request.tokens)]
        self.scheduler.note_left(waves)
        for request in [request for request in ending if not request.max_new]:
            self.end(request, "length")
        if logits is not None and len(logits):
            choice = self.runner.choose(logits, [request for request in ending if request.max_new])
            self.reads.ask(choice.answers, partial(self._take, choice))

    def _settle_drafts(self, waves: list[Wave], logits: Tensor) -> tuple[list[Wave], Tensor]:
        """Guess and check; the waves and logits of requests that do neither are left."""
        left, rows = [], []
        for wave, own in zip(waves, logits.split([wave.wanted for wave in waves]), strict=True):
            if wave.request.draft is None:
                left.append(wave)
                rows.append(own)
            elif wave.cap is not None:
                guess(wave.request, own)
                self.stats.draft_tokens += 1
                self.scheduler.note_guessed(wave)
            else:
                self._check(wave, wave.request.draft, own)
        return left, torch.cat(rows) if rows else logits[:0]

    def _check(self, wave: Wave, draft: Draft, logits: Tensor) -> None:
        """Say what the whole network says, as far as the guesses were right and one token more."""
        request, check = wave.request, Check(wave.request, draft, logits)
        now, reason, place = time.perf_counter(), None, 0
        request.draft = None
        while reason is None:
            request.position_depths[wave.start + place :] = [wave.depths[place]]
            token, likely = check.token(place)
            reason = self._say(request, token, now, likely)
            if place == draft.wanted or token != draft.tokens[place]:
                break
            place += 1
        self.stats.drafts += 1
        self.stats.accepted_tokens += place
        self.scheduler.note_checked(wave, draft, len(request.tokens) - 1 - wave.start)
        if reason is not None:
            self.end(request, reason)

    def _take(self, choice: Choice, *answers: list[Any]) -> None:
        """Tokens that were chosen, now that they are read."""
        now = time.perf_counter()
        for request, token, likely in zip(choice.requests, *choice.told(*answers), strict=True):
            if request.finish_reason is not None:  # given up in the meantime
                continue
            if (reason := self._say(request, token, now, likely)) is not None:
                self.end(request, reason)

    def _say(
        self, request: Request, token: int, now: float, likely: TokenLogprobs | None
    ) -> str | None:
        """Add a token; why it ends the completion, if it does."""
        if request.params.output_kind != "final_only":
            self._touched[request.group] = None
        self.stats.new_depths[request.take(token, now, likely)] += 1
        self.stats.sampled += 1
        return request.end_reason()

    def end(self, request: Request, reason: str) -> None:
        """``request`` is over, and holds nothing any more."""
        if reason != "abort":  # who gives it up is told at once
            self._touched[request.group] = None
        self.scheduler.drop(request)
        request.finish_reason, request.ended = reason, time.perf_counter()
        self.stats.aborted += reason == "abort"
        self.stats.finished += reason != "abort"

    def touched(self) -> dict[str, None]:
        """Groups with new tokens to tell, or ends, since the last call."""
        found, self._touched = self._touched, {}
        return found
