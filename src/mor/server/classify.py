"""The application of a model of images or sounds: ``/v1/classify`` and what stands around it."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from fastapi import APIRouter, FastAPI, Request
from fastapi.responses import PlainTextResponse, Response
from prometheus_client import generate_latest
from starlette.middleware.cors import CORSMiddleware

import mor
from mor.server import classify_page
from mor.server.app import MAX_BODY
from mor.server.bodies import JsonRoute
from mor.server.classifier import Classifier
from mor.server.crossing import CORS, Head, check_origins
from mor.server.errors import ApiError, add_handlers
from mor.server.keys import check_keys
from mor.server.metrics import ServerMetrics
from mor.server.middleware import Guard
from mor.server.routes import describe_errors
from mor.server.schema.classify import (
    ClassifierList,
    ClassifierModel,
    ClassifyRequest,
    ClassifyResponse,
)
from mor.server.schema.responses import Health, Version
from mor.server.state import check_depth_cap, refuse_model

router = APIRouter(route_class=JsonRoute)


@dataclass
class ClassifierState:
    """What the routes share.

    Attributes:
        model: the name that clients use.
        loop: the model in its thread.
        metrics: counters.
        created: when it started, Unix seconds.
    """

    model: str
    loop: Classifier
    metrics: ServerMetrics
    created: int = field(default_factory=lambda: int(time.time()))

    def card(self) -> ClassifierModel:
        """The model as /v1/models lists it."""
        of = self.loop
        return ClassifierModel(
            id=self.model, object="model", created=self.created, owned_by="mor", task="classify",
            takes=of.takes, labels=of.labels,  # type: ignore[arg-type]
            num_recursions=of.config.num_recursions, router=of.config.router,
        )  # fmt: skip


def create_classifier_app(
    classifier: Classifier,
    model: str,
    *,
    api_keys: Sequence[str] = (),
    max_body: int = MAX_BODY,
    with_playground: bool = True,
    cors_origins: Sequence[str] = (),
) -> FastAPI:
    """An ASGI application around a model of images or sounds.

    Args:
        classifier: which from now on belongs to it.
        model: the name that clients use.
        api_keys, max_body, with_playground, cors_origins: as of :func:`mor.server.create_app`.

    Raises:
        MorError: a key or an origin that is none.
    """
    check_keys(api_keys)
    check_origins(cors_origins)
    metrics = ServerMetrics(model)

    @asynccontextmanager
    async def life(app: FastAPI) -> AsyncIterator[None]:
        classifier.start()
        yield
        classifier.stop()

    app = FastAPI(
        title="mor", version=mor.__version__, lifespan=life, docs_url=None, redoc_url=None
    )
    app.state.mor = ClassifierState(model, classifier, metrics)
    app.include_router(router)
    if with_playground:
        app.include_router(classify_page.router)
    add_handlers(app)
    app.add_middleware(Guard, keys=api_keys, max_body=max_body, metrics=metrics)
    app.add_middleware(Head)
    if cors_origins:
        app.add_middleware(CORSMiddleware, allow_origins=list(cors_origins), **CORS)
    return app


def _state(request: Request) -> ClassifierState:
    state = request.app.state.mor
    assert isinstance(state, ClassifierState)
    return state


@router.post("/v1/classify", responses=describe_errors(400, 401, 404, 413, 429, 500, 503))
async def classify(request: Request, body: ClassifyRequest) -> ClassifyResponse:
    """Classes of images or sounds, with the depth of every patch or frame."""
    state = _state(request)
    refuse_model(body.model, state.model)
    recursions = state.loop.config.num_recursions
    check_depth_cap(body.depth_cap, recursions)
    items = body.input if isinstance(body.input, list) else [body.input]
    data: list[Any] = await state.loop.classify(items, body.depth_cap)
    tokens = sum(len(one["depths"]) for one in data)
    return ClassifyResponse(
        id=f"classify-{uuid.uuid4().hex}", object="list", created=int(time.time()),
        model=state.model, labels=state.loop.labels, num_recursions=recursions, data=data,
        usage={"prompt_tokens": tokens, "total_tokens": tokens},  # type: ignore[arg-type]
    )  # fmt: skip


@router.get("/v1/models", responses=describe_errors(401))
async def models(request: Request) -> ClassifierList:
    """The models of this server: one."""
    return ClassifierList(object="list", data=[_state(request).card()])


@router.get("/v1/models/{model:path}", responses=describe_errors(401, 404))
async def model_card(request: Request, model: str) -> ClassifierModel:
    """The card of the model that is served."""
    state = _state(request)
    refuse_model(model, state.model)
    return state.card()


@router.get("/health")
async def health(request: Request) -> Health:
    """Whether the process works at all."""
    return Health(status="ok")


@router.get("/ready", responses=describe_errors(503))
async def ready(request: Request) -> Health:
    """Whether it takes requests: not while it shuts down."""
    if not _state(request).loop.ready:
        raise ApiError(503, "Not ready: shutting down", code="not_ready")
    return Health(status="ready")


@router.get("/version")
async def version() -> Version:
    """The version of this package."""
    return Version(version=mor.__version__)


@router.get("/metrics", response_class=PlainTextResponse)
async def metrics(request: Request) -> Response:
    """Counters of the server in Prometheus' text format."""
    content = generate_latest(_state(request).metrics.registry)
    return Response(content, media_type="text/plain; version=0.0.4; charset=utf-8")
