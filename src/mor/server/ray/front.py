"""The front: takes requests, finds each a replica, and never lets one be cut silently."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing

from fastapi import Request
from fastapi.responses import JSONResponse, Response
from starlette.types import Message, Receive, Scope, Send

from mor.server.errors import ApiError
from mor.server.events import ClientGone, encode_event, while_connected
from mor.server.failures import shutting_down
from mor.server.ray.backend import Backend, NoReplica, ReplicaLost, TooMany
from mor.server.ray.calls import Call, plain_scope
from mor.server.ray.held import Held
from mor.server.ray.prefixes import blocks_of
from mor.server.ray.totals import Totals

log = logging.getLogger("mor.server")

TEXT = "text/plain; version=0.0.4; charset=utf-8"
LOST = "replica_lost"


def replica_lost(began: bool) -> ApiError:
    """The replica died, and no other could be asked in its place."""
    what = "in the middle of this answer" if began else "before it answered"
    return ApiError(
        503,
        f"The replica that worked on the request died {what}; send the request again",
        code=LOST,
        headers={"Retry-After": "1"},
    )


def no_replica() -> ApiError:
    """None is there, or none took the request in time."""
    message = "No replica is ready to take the request; try again soon"
    return ApiError(503, message, code="no_replica", headers={"Retry-After": "2"})


def too_many() -> ApiError:
    """All replicas are full, and so is the queue before them."""
    message = "All replicas are busy; try again soon"
    return ApiError(429, message, code="overloaded", headers={"Retry-After": "1"})


class Front:
    """An ASGI application that has its answers from replicas.

    A request whose replica dies, or refuses it for the load, is given to another one as long as
    nothing has been sent to the client; then the client gets an error, in a stream as its
    last event.

    Args:
        backend: the replicas.
        totals: of their metrics.
        patience: seconds to wait for a replica that takes the request.
        attempts: how many replicas a request is given to, at most.
    """

    def __init__(
        self, backend: Backend, totals: Totals, patience: float = 30.0, attempts: int = 4
    ) -> None:
        self.backend, self.totals = backend, totals
        self.patience, self.attempts = patience, attempts
        self.draining = False
        self.under_way = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        own: dict[str, Callable[[], Awaitable[Response]]] = {
            "/health": self._health,
            "/ready": self._ready,
            "/metrics": self._metrics,
        }
        if scope["type"] != "http":
            return
        request = Request(scope, receive)
        try:
            if scope["path"] in own and scope["method"] in ("GET", "HEAD"):
                response = await own[scope["path"]]()
                await response(scope, receive, send)
                return
            if self.draining and scope["method"] == "POST":
                raise shutting_down({"Retry-After": "5"})
            body = await request.body()
            self.under_way += 1
            try:
                await while_connected(request, self._forward(scope, body, send))
            finally:
                self.under_way -= 1
        except ClientGone:
            return
        except ApiError as error:
            await error.response()(scope, receive, send)

    # Of the front itself -------------------------------------------------------------------------

    async def _health(self) -> Response:
        """Whether the front works: it does if it can say so."""
        return JSONResponse({"status": "ok"})

    async def _ready(self) -> Response:
        told = [] if self.draining else await self.backend.tell()
        if not any(one["ready"] for one in told):
            why = "shutting down" if self.draining else "no replica is ready"
            raise ApiError(503, f"Not ready: {why}", code="not_ready")
        return JSONResponse({"status": "ready"})

    async def _metrics(self) -> Response:
        return Response(self.totals.text(await self.backend.tell()), media_type=TEXT)

    async def drain(self, seconds: float) -> None:
        """Take no more, and let what is under way finish for so long."""
        self.draining = True
        loop = asyncio.get_running_loop()
        end = loop.time() + seconds
        while self.under_way and loop.time() < end:
            await asyncio.sleep(0.02)

    # Through a replica ---------------------------------------------------------------------------

    async def _forward(self, scope: Scope, body: bytes, send: Send) -> None:
        """Give a request to replicas until one answers.

        Raises:
            ApiError: none did, and nothing has been sent.
        """
        plain = plain_scope(scope)
        blocks = blocks_of(body) if scope["method"] == "POST" else ()
        avoid: list[str] = []
        refusal: Held | ApiError | None = None
        for _ in range(self.attempts):
            held = Held(send)
            call = Call(plain, body, blocks, tuple(avoid))
            try:
                async with aclosing(self.backend.ask(call)) as asked:
                    name = await self._first(asked)
                    if name in avoid:
                        break  # every one has refused or died
                    avoid.append(name)
                    async for messages in asked:
                        assert not isinstance(messages, str)
                        await held.take(messages)
                if not held.complete:
                    raise ReplicaLost("its answer has no end")
            except ReplicaLost as error:
                if not held.complete:
                    log.warning("a replica was lost with a request: %s", error)
                    if held.sent:
                        await self._tell_lost(send)
                        return
                    self.totals.retries.inc()
                    continue
            except NoReplica:
                raise no_replica() from None
            except TooMany:
                refusal = refusal or too_many()
                break
            if not held.retryable:
                return
            refusal = held
            self.totals.retries.inc()
        if isinstance(refusal, Held):
            await refusal.release()
            return
        if refusal is None:
            self.totals.lost.inc()
        raise refusal or replica_lost(False)

    async def _first(self, asked: AsyncIterator[str | list[Message]]) -> str:
        """The name of the replica that takes the request.

        Raises:
            NoReplica: none does in time.
            ReplicaLost: it ended before it began.
        """
        try:
            name = await asyncio.wait_for(anext(asked), self.patience)
        except TimeoutError:
            raise NoReplica from None
        except StopAsyncIteration:
            raise ReplicaLost("it ended without an answer") from None
        assert isinstance(name, str)
        return name

    async def _tell_lost(self, send: Send) -> None:
        """The end of a stream whose replica died in the middle of it: an error, as its last event.

        Only streams are ever half sent; see :class:`mor.server.ray.held.Held`.
        """
        self.totals.lost.inc()
        for event in (replica_lost(True).body(), "[DONE]"):
            body = encode_event(event)
            await send({"type": "http.response.body", "body": body, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})
