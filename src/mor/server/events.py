"""Server-sent events, and calls that end when the client goes away."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, TypeVar

from fastapi import Request
from fastapi.responses import Response
from starlette.types import Receive, Scope, Send

from mor.server.errors import ApiError

T = TypeVar("T")


class ClientGone(Exception):
    """Nobody reads the answer any more."""


async def _wait_until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _race(receive: Receive, work: Awaitable[T]) -> T:
    """``work``, cancelled as soon as the client goes away.

    Raises:
        ClientGone: it did.
    """
    working = asyncio.ensure_future(work)
    watching = asyncio.create_task(_wait_until_gone(receive))
    try:
        await asyncio.wait({working, watching}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientGone
        return working.result()
    finally:
        for task in (working, watching):
            task.cancel()
        await asyncio.gather(working, watching, return_exceptions=True)


async def while_connected(request: Request, work: Awaitable[T]) -> T:
    """The result of ``work``; its body must have been read.

    Raises:
        ClientGone: the client went away first, and ``work`` was cancelled.
    """
    return await _race(request.receive, work)


def encode_event(content: Any) -> bytes:
    """One server-sent event: an object as JSON, or a text as it is."""
    text = content if isinstance(content, str) else to_json(content)
    return f"data: {text}\n\n".encode()


def to_json(content: Any) -> str:
    """JSON without a line end of any kind.

    U+2028, U+0085 and their like are escaped: clients that split as Python does end a line there.
    """
    return json.dumps(content, ensure_ascii=True, separators=(",", ":"))


class EventResponse(Response):
    """Sends events as they come; where the client goes away the source is closed at once.

    Args:
        events: JSON objects. An :class:`ApiError` in between becomes the last event.
        close: called in the end, however it ends.
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[dict[str, Any]], close: Callable[[], None]) -> None:
        self.status_code, self.background = 200, None
        self.events, self.close = events, close
        # No proxy may hold events back to send them together.
        self.init_headers({"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send events until there are no more, or the client goes away."""
        try:
            await _race(receive, self._send(send))
        except (ClientGone, OSError):
            pass
        finally:
            self.close()

    async def _send(self, send: Send) -> None:
        start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        await send(start)
        try:
            async for event in self.events:
                await send(
                    {"type": "http.response.body", "body": encode_event(event), "more_body": True}
                )
        except ApiError as error:
            body = encode_event(error.body())
            await send({"type": "http.response.body", "body": body, "more_body": True})
        last = encode_event("[DONE]")
        await send({"type": "http.response.body", "body": last, "more_body": False})
