"""The application: routes, guard and engine put together."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware

import mor
from mor.engine import Engine
from mor.errors import MorError
from mor.folder.levels import Levels
from mor.server import playground, routes, tokenizing
from mor.server.crossing import CORS, Head, check_origins
from mor.server.errors import add_handlers
from mor.server.images import Reader
from mor.server.keys import check_keys
from mor.server.loop import EngineLoop
from mor.server.metrics import ServerMetrics
from mor.server.middleware import Guard
from mor.server.schema.messages import show_media
from mor.server.state import State
from mor.server.structure.grammars import Grammars
from mor.server.templates import check_template
from mor.server.tokens import Tokens

log = logging.getLogger("uvicorn.error")

MAX_BODY = 4 << 20
LEAST_TOKENS = 32  # a short prompt and the answer of 16 tokens that is the default


def create_app(
    engine: Engine,
    model: str,
    *,
    api_keys: Sequence[str] = (),
    max_waiting: int = 128,
    max_body: int = MAX_BODY,
    max_restarts: int = 3,
    chat_template: str | None = None,
    levels: Levels | None = None,
    images: Reader | None = None,
    with_playground: bool = True,
    cors_origins: Sequence[str] = (),
) -> FastAPI:
    """An ASGI application around an engine, which from now on belongs to it.

    Args:
        engine: with a tokenizer.
        model: the name that clients use.
        api_keys: one of which every path needs but a few; none: open to all.
        max_waiting: completions that may wait beside those with pages; more are answered 429.
        max_body: most bytes of a request's body.
        max_restarts: how often within a minute the engine may be started again after a failed tick;
            then the server stays down.
        chat_template: Jinja text in place of the tokenizer's own.
        levels: calibrated capacities that a request may choose from.
        images: for a model that reads images, or hears sounds.
        with_playground: serve the page at ``/``.
        cors_origins: origins whose pages may ask from a browser; ``*`` for all.

    Raises:
        MorError: the engine has no tokenizer or too few pages for an ordinary request, the chat
            template does not work, or a bound is out of range.
    """
    if engine.tokenizer is None:
        raise MorError("engine has no tokenizer; a server needs one: Engine(model, tokenizer)")
    bounds = {"max_waiting": max_waiting, "max_body": max_body, "max_restarts": max_restarts}
    for name, value in bounds.items():
        if value < 0:
            raise MorError(f"{name}={value} must be at least 0")
    check_keys(api_keys)
    check_origins(cors_origins)
    engine.sizes.fit(engine.config, engine.store.pool.num_pages, LEAST_TOKENS)
    if levels:
        levels.check_depths(engine.config.num_recursions)
    template = check_template(engine.tokenizer, chat_template, "chat_template")
    metrics = ServerMetrics(model)
    loop = EngineLoop(engine, max_waiting, metrics, max_restarts)
    tokens = Tokens(engine.tokenizer, engine.config, template)
    grammars = Grammars(tokens.tokenizer, engine.intake.ends, engine.config.vocab_size)

    @asynccontextmanager
    async def life(app: FastAPI) -> AsyncIterator[None]:
        loop.start()
        log.info("Attention over pages: %s", engine.attention)
        yield
        loop.stop()
        tokens.close()
        if images is not None:
            images.close()
        grammars.close()

    app = FastAPI(
        title="mor", version=mor.__version__, lifespan=life, docs_url=None, redoc_url=None
    )
    app.state.mor = State(model, loop, tokens, grammars, metrics, levels, images)
    app.include_router(routes.router)
    app.include_router(tokenizing.router)
    if with_playground:
        app.include_router(playground.router)
    add_handlers(app)
    app.add_middleware(Guard, keys=api_keys, max_body=max_body, metrics=metrics)
    app.add_middleware(Head)
    if cors_origins:  # outermost: a browser must be let see refusals too
        app.add_middleware(CORSMiddleware, allow_origins=list(cors_origins), **CORS)
    _document(app, model, None if images is None else images.part)
    return app


def _document(app: FastAPI, model: str, part: str | None) -> None:
    """Let ``/openapi.json`` tell the truth: our errors, not FastAPI's 422, and the model's name."""
    plain = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            schema = plain()
            for path in schema["paths"].values():
                for operation in path.values():
                    operation["responses"].pop("422", None)
            schemas = schema["components"]["schemas"]
            for name in ("HTTPValidationError", "ValidationError"):
                schemas.pop(name, None)
            for name in ("CompletionRequest", "ChatRequest"):
                schemas[name]["properties"]["model"]["enum"] = [model]
            if part is not None:
                show_media(schemas["Part"], part)
            app.openapi_schema = schema
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]
