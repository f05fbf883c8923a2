"""What comes out of the engine: completions, their log-probabilities and timings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, NamedTuple


class Timings(NamedTuple):
    """Seconds on the engine's clock; None for what has not happened yet.

    Attributes:
        queue: from arrival to the first admission.
        first_token: from arrival to the first token.
        between_tokens: between each token and the one before, known at the end.
        total: from arrival to the end.
    """

    queue: float | None = None
    first_token: float | None = None
    between_tokens: tuple[float, ...] = ()
    total: float | None = None

    @classmethod
    def of(
        cls, arrival: float, admitted: float | None, tokens: Sequence[float], ended: float | None
    ) -> Timings:
        """From moments on the engine's clock: ``tokens`` when each new one came."""
        return cls(
            queue=None if admitted is None else admitted - arrival,
            first_token=tokens[0] - arrival if tokens else None,
            # Not before: a tuple as long as the answer for each of its tokens would be quadratic.
            between_tokens=() if ended is None else tuple(b - a for a, b in pairwise(tokens)),
            total=None if ended is None else ended - arrival,
        )


@dataclass(frozen=True)
class TokenLogprobs:
    """Log-probabilities (nats) at one token: its own, and the likeliest tokens'.

    ``rank`` is given for tokens of a prompt: 1 where no token is likelier.
    """

    token: int
    logprob: float
    top: dict[int, float]
    rank: int | None = None


OutputKind = Literal["cumulative", "delta", "final_only"]
"""vLLM's ``RequestOutputKind``."""


@dataclass(slots=True)  # not frozen: one is made for every token, and that costs
class Completion:
    """One answer, complete or so far, or what is new of it.

    Attributes:
        index: which of the n completions.
        token_ids: new tokens, an ending token included.
        text: their text without special tokens, cut before a stop text, and without a stop id's
            (``SamplingParams`` can ask for all of them); None without a tokenizer.
            While the completion goes on, what may still become part of a character or of a stop
            text is held back, so that the text only ever grows.
        depths: recursions that ran at the position each token was sampled from.
        prompt_depths: the same for each token of the prompt, known once it is read.
        finish_reason: ``stop`` (end of text, stop id, stop text, end of the grammar), ``length``,
            ``abort``, ``error`` (its grammar cannot go on); None while it goes on.
        stop_reason: the stop id or stop text that ended it.
        logprobs: one per token, where asked for.
        prompt_logprobs: one per token of the prompt as far as it is read, where asked for; None
            for the first, which nothing comes before.
        timings: how long it took.
        cached_tokens: tokens of the prompt that were not computed for it: others had been there.
    """

    index: int
    token_ids: tuple[int, ...]
    text: str | None
    depths: tuple[int, ...]
    prompt_depths: tuple[int, ...]
    finish_reason: str | None
    stop_reason: int | str | None
    logprobs: tuple[TokenLogprobs, ...] | None
    prompt_logprobs: tuple[TokenLogprobs | None, ...] | None
    timings: Timings
    cached_tokens: int = 0


@dataclass(eq=False)
class Told:
    """What has been told of a completion, so that nothing is made twice.

    Attributes:
        tokens, chars: told so far, where what is new is told.
        prompt_logprobs, prompt_depths: as told last.
        begun: the timings until it ends.
        over: the completion, once it has ended.
    """

    tokens: int = 0
    chars: int = 0
    prompt_logprobs: tuple[TokenLogprobs | None, ...] = ()
    prompt_depths: tuple[int, ...] = ()
    begun: Timings | None = None
    over: Completion | None = None


class RequestOutput(NamedTuple):
    """All completions of a request, as they stand.

    Attributes:
        request_id: the request's.
        prompt_token_ids: the prompt.
        completions: n of them.
        finished: whether all are complete.
    """

    request_id: str
    prompt_token_ids: tuple[int, ...]
    completions: tuple[Completion, ...]
    finished: bool
