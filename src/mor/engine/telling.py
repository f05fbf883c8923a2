"""How a completion is told while it goes on: all of it each time, or what is new."""

from __future__ import annotations

from mor.engine.outputs import Completion, Timings, TokenLogprobs
from mor.engine.request import Request


def tell_completion(request: Request) -> Completion:
    """The completion of ``request`` as it stands, or what is new of it, as it asks for.

    One that has ended is made once: its group may go on for long.
    """
    told = request.told
    if told.over is not None:
        return told.over
    params, over = request.params, request.finish_reason is not None
    delta = params.output_kind == "delta"
    first, text = told.tokens, None
    if request.text is not None:
        text = request.text.text(over)
        if delta:
            told.chars, text = len(text), text[told.chars :]
    made = Completion(
        index=request.index,
        token_ids=tuple(request.tokens[len(request.prompt) + first :]),
        text=text,
        depths=tuple(request.token_depths[first:]),
        prompt_depths=_prompt_depths(request),
        finish_reason=request.finish_reason,
        stop_reason=request.stop_reason,
        logprobs=None if params.logprobs is None else tuple(request.logprobs[first:]),
        prompt_logprobs=None if params.prompt_logprobs is None else _prompt_logprobs(request),
        timings=_timings(request, over),
        cached_tokens=request.cached_tokens,
    )
    if delta:
        told.tokens = len(request.token_depths)
    elif over:
        told.over = made
    return made


def _prompt_logprobs(request: Request) -> tuple[TokenLogprobs | None, ...]:
    """Made once, and not for each of the new tokens."""
    told = request.told
    if len(told.prompt_logprobs) != len(request.prompt_logprobs):
        told.prompt_logprobs = tuple(request.prompt_logprobs)
    return told.prompt_logprobs


def _prompt_depths(request: Request) -> tuple[int, ...]:
    """Made once it is read, and not for each of the new tokens."""
    told = request.told
    if not request.token_depths or len(told.prompt_depths) < len(request.prompt):
        told.prompt_depths = tuple(request.position_depths[: len(request.prompt)])
    return told.prompt_depths


def _timings(request: Request, over: bool) -> Timings:
    """As far as they are known."""
    told = request.told
    if told.begun is not None and not over:
        return told.begun  # until it ends nothing more is told
    timings = Timings.of(request.arrival, request.admitted, request.token_times, request.ended)
    if request.token_times:
        told.begun = timings
    return timings
