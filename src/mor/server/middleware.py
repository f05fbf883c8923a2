"""What stands before the routes: a bound on bodies, keys, and the count of answers."""

from __future__ import annotations

import hmac
from collections.abc import Sequence
from typing import Protocol

from fastapi.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mor.server.errors import ApiError

# What anybody may ask; every other path needs a key where the server has any.
OPEN = frozenset({"/", "/health", "/ready", "/version", "/metrics", "/openapi.json"})
SLACK = 4  # times the largest body are read of one that is too large


class Counts(Protocol):
    """Counts answers."""

    def answered(self, status: int) -> None:
        """An answer of any path was sent."""


class Guard:
    """Plain ASGI, so that streams and disconnects pass through it untouched.

    Args:
        app: what stands behind.
        keys: API keys, one of which every path but those of ``OPEN`` needs; none: open to all.
        max_body: most bytes of a body.
        metrics: counts answers.
    """

    def __init__(self, app: ASGIApp, keys: Sequence[str], max_body: int, metrics: Counts) -> None:
        self.app, self.max_body, self.metrics = app, max_body, metrics
        self.keys = [key.encode() for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request through, or answer it."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                self.metrics.answered(message["status"])
            await send(message)

        headers = dict(scope["headers"])
        problem: ApiError | None = None
        if self.keys and scope["path"] not in OPEN and not self._is_known(headers):
            problem = ApiError(
                401,
                "Give a valid API key: Authorization: Bearer KEY",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
        else:
            body = await self._body(headers, receive)
            if body is None:
                problem = ApiError(
                    413, f"The body is larger than {self.max_body} bytes", code="body_too_large"
                )
        if problem is not None:
            # What is left of the body is not read: the connection must not be used again.
            problem.headers["Connection"] = "close"
            answer: Response = problem.response()
            await answer(scope, receive, counted)
            return
        waiting: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def again() -> Message:
            return waiting.pop() if waiting else await receive()

        await self.app(scope, again, counted)

    def _is_known(self, headers: dict[bytes, bytes]) -> bool:
        kind, _, given = headers.get(b"authorization", b"").partition(b" ")
        # Every key is compared, in constant time, so that the time tells nothing.
        same = [hmac.compare_digest(given.strip(), key) for key in self.keys]
        return any(same) and kind.lower() == b"bearer"

    async def _body(self, headers: dict[bytes, bytes], receive: Receive) -> bytes | None:
        """The whole body; None where it is too large.

        A little more is read and thrown away: a client that is still sending when the connection
        closes would never see the answer.
        """
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length) > SLACK * self.max_body:
            return None
        parts, size = [], 0
        while size <= SLACK * self.max_body:
            message = await receive()
            if message["type"] == "http.disconnect":
                break
            part = message.get("body", b"")
            size += len(part)
            if size <= self.max_body:
                parts.append(part)
            if not message.get("more_body", False):
                break
        return b"".join(parts) if size <= self.max_body else None
