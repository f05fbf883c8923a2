"""From a request's fields to what the engine is asked for."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from mor.engine import Engine, SamplingParams
from mor.errors import MorError
from mor.folder.levels import Levels
from mor.server.errors import ApiError, explain_refusal
from mor.server.schema.requests import ChatRequest, CompletionRequest, Sampling
from mor.server.state import check_depth_cap

DEFAULT_MAX_TOKENS = 16  # of /v1/completions, as OpenAI's; a chat goes on as long as it fits


def sampling_params(
    body: Sampling, prompts: Sequence[Sequence[int]], engine: Engine, levels: Levels | None
) -> SamplingParams:
    """Parameters for all prompts of a request.

    Raises:
        ApiError: a prompt that does not fit, a value that the model does not allow.
    """
    check_depth_cap(body.depth_cap, engine.config.num_recursions)
    longest = max(map(len, prompts))
    wanted = _max_tokens(body)
    if longest + (1 if wanted is None else wanted) > engine.max_model_len:
        raise ApiError(
            400,
            f"The prompt has {longest} tokens and max_tokens is "
            f"{'not set' if wanted is None else wanted}; together at most "
            f"{engine.max_model_len} fit",
            param="prompt" if isinstance(body, CompletionRequest) else "messages",
            code="context_length_exceeded",
        )
    if wanted is None and isinstance(body, CompletionRequest):
        wanted = DEFAULT_MAX_TOKENS  # or what fits: see `is_open`
    try:
        params = SamplingParams(
            max_tokens=wanted,
            temperature=_or(body.temperature, 1.0),
            top_k=max(0, body.top_k or 0),
            top_p=max(_or(body.top_p, 1.0), sys.float_info.min),  # 0: the likeliest token alone
            min_p=body.min_p or 0.0,
            repetition_penalty=_or(body.repetition_penalty, 1.0),
            presence_penalty=body.presence_penalty or 0.0,
            frequency_penalty=body.frequency_penalty or 0.0,
            logit_bias={int(token): bias for token, bias in (body.logit_bias or {}).items()},
            seed=_seed(body.seed),
            stop=body.stop or (),
            stop_token_ids=body.stop_token_ids or (),
            ignore_eos=bool(body.ignore_eos),
            logprobs=_logprobs(body),
            prompt_logprobs=_prompt_logprobs(body),
            n=body.n or 1,
            max_depth=body.depth_cap,
            boundaries=_boundaries(body, levels),
        )
        params.check_vocabulary(engine.config.vocab_size)
    except MorError as error:
        raise explain_refusal(error) from None
    return params


def is_open(body: Sampling) -> bool:
    """Whether no number of new tokens is asked for, so that each prompt gets what fits."""
    return _max_tokens(body) is None


def _boundaries(body: Sampling, levels: Levels | None) -> tuple[float, ...] | None:
    if body.capacity is None:
        return None
    if levels is None:
        raise MorError(
            f"capacity={body.capacity} needs a model with calibrated levels (router expert_choice "
            "or threshold; mor calibrate DIR --data DATA --levels --out NEW); leave it out"
        )
    return levels.boundaries(body.capacity)


def _or(value: float | None, default: float) -> float:
    return default if value is None else value


def _seed(seed: int | None) -> int | None:
    """The engine counts seeds from 0. -1 draws one, as in vLLM and llama.cpp."""
    return None if seed is None or seed == -1 else seed % 2**64


def _max_tokens(body: Sampling) -> int | None:
    if isinstance(body, ChatRequest) and body.max_completion_tokens is not None:
        return body.max_completion_tokens
    return body.max_tokens


def _logprobs(body: Sampling) -> int | None:
    if isinstance(body, CompletionRequest):
        return body.logprobs
    if isinstance(body, ChatRequest) and body.logprobs:
        return body.top_logprobs or 0
    return None


def _prompt_logprobs(body: Sampling) -> int | None:
    """As many as either field shows; none to show where a prompt is read and nothing is added."""
    asked = [body.prompt_logprobs]
    if isinstance(body, CompletionRequest) and body.echo:
        asked.append(body.logprobs)
    if body.max_tokens == 0:
        asked.append(0)
    return max((count for count in asked if count is not None), default=None)
