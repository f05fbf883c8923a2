"""The paths of the API."""

from __future__ import annotations

import time
import uuid
from collections.abc import Coroutine, Sequence
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response

from mor.errors import MorError
from mor.server.bodies import JsonRoute
from mor.server.errors import ApiError, ErrorResponse, explain_refusal
from mor.server.events import ClientGone, EventResponse, while_connected
from mor.server.failures import engine_failed
from mor.server.jobs import Job
from mor.server.render import Renderer
from mor.server.sampling import is_open, sampling_params
from mor.server.schema.requests import ChatRequest, CompletionRequest
from mor.server.schema.responses import (
    ChatResponse,
    CompletionResponse,
    Health,
    Model,
    ModelList,
)
from mor.server.shaping import encode_turns, make_reader, shape_params
from mor.server.state import State, get_state

router = APIRouter(route_class=JsonRoute)

_REASONS = {
    400: "a field is wrong",
    401: "no valid API key",
    404: "no such model",
    413: "the body is too large",
    429: "too much is under way; see Retry-After",
    500: "the engine failed",
    503: "the server is shutting down, or its engine was started again: try again",
}
# OpenAPI 3.1 has no words for events.
_STREAM: dict[str, Any] = {"content": {"text/event-stream": {}}}


def describe_errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """What the schema tells of errors with these statuses."""
    return {s: {"model": ErrorResponse, "description": _REASONS[s]} for s in statuses}


_CALLS = describe_errors(400, 401, 404, 413, 429, 500, 503)


@router.get("/v1/models", responses=describe_errors(401))
async def models(request: Request) -> ModelList:
    """The models of this server: one."""
    return ModelList(object="list", data=[Model(**get_state(request).card())])


@router.get("/v1/models/{model:path}", responses=describe_errors(401, 404))
async def model_card(request: Request, model: str) -> Model:
    """The card of the model that is served."""
    state = get_state(request)
    state.check_model(model)
    return Model(**state.card())


@router.post(
    "/v1/completions",
    response_model=None,
    responses=_CALLS | {200: {"model": CompletionResponse} | _STREAM},
)
async def completions(request: Request, body: CompletionRequest) -> Response:
    """Go on from a text or token ids."""
    state = get_state(request)
    state.check_model(body.model)
    prompt = body.prompt
    several = isinstance(prompt, list) and not isinstance(prompt[0], int)
    prompts: Sequence[Any] = prompt if several else [prompt]

    async def encode() -> Sequence[Sequence[int]]:
        try:
            return await state.tokens.encode(prompts, state.engine.max_model_len)
        except MorError as error:
            problem = explain_refusal(error)
            problem.param = "prompt"
            raise problem from None

    return await _answer(request, state, body, len(prompts), encode(), "cmpl")


@router.post(
    "/v1/chat/completions",
    response_model=None,
    responses=_CALLS | {200: {"model": ChatResponse} | _STREAM},
)
async def chat_completions(request: Request, body: ChatRequest) -> Response:
    """Answer a chat, by the model's chat template."""
    state = get_state(request)
    state.check_model(body.model)

    async def encode() -> Sequence[Sequence[int]]:
        return [await encode_turns(body, state, state.engine.max_model_len)]

    return await _answer(request, state, body, 1, encode(), "chatcmpl")


async def _answer(
    request: Request,
    state: State,
    body: CompletionRequest | ChatRequest,
    prompts: int,
    encoding: Coroutine[Any, Any, Sequence[Sequence[int]]],
    kind: str,
) -> Response:
    try:
        job = await _begin(request, state, body, prompts, encoding, kind)
    except ClientGone:
        return Response(status_code=499)  # nobody reads it
    streaming = False
    try:
        readers = [make_reader(body, state) for _ in job.cursors]
        grid = None if state.images is None else state.images.grid
        began = int(time.time())
        renderer = Renderer(body, job, state.model, state.tokens, began, readers, grid)
        await while_connected(request, job.accepted())
        if body.stream:
            streaming = True
            return EventResponse(renderer.chunks(), lambda: state.loop.abort(job))
        return JSONResponse(await while_connected(request, renderer.whole()))
    except ClientGone:
        return Response(status_code=499)
    finally:
        if not streaming:
            state.loop.abort(job)


async def _begin(
    request: Request,
    state: State,
    body: CompletionRequest | ChatRequest,
    prompts: int,
    encoding: Coroutine[Any, Any, Sequence[Sequence[int]]],
    kind: str,
) -> Job:
    """Places first, then tokens: what finds no place costs nothing."""
    try:
        places = state.loop.reserve(prompts, body.n or 1)
    except ApiError:
        encoding.close()
        raise
    try:
        ids = await while_connected(request, encoding)
        params = sampling_params(body, ids, state.engine, state.levels)
        params = await while_connected(request, shape_params(params, body, state))
        fits = state.engine.max_model_len if is_open(body) else None
        job = Job(f"{kind}-{uuid.uuid4().hex}", ids, params, bool(body.stream), fits)
    except BaseException:
        state.loop.release(places)
        raise
    state.loop.submit(job)
    return job


@router.get("/health", responses=describe_errors(503))
async def health(request: Request) -> Health:
    """Whether the process works at all."""
    failure = get_state(request).loop.failure
    if failure is not None:
        raise engine_failed(failure)
    return Health(status="ok")


@router.get("/ready", responses=describe_errors(503))
async def ready(request: Request) -> Health:
    """Whether it takes requests: not while it shuts down, and not after a failure."""
    loop = get_state(request).loop
    if not loop.ready:
        why = f"the engine failed: {loop.failure}" if loop.failure else "shutting down"
        raise ApiError(503, f"Not ready: {why}", code="not_ready")
    return Health(status="ready")


@router.get("/metrics", response_class=PlainTextResponse)
async def metrics(request: Request) -> Response:
    """Counters of server and engine in Prometheus' text format."""
    state = get_state(request)
    content = await state.loop.call(state.metrics.text)
    return Response(content, media_type="text/plain; version=0.0.4; charset=utf-8")
