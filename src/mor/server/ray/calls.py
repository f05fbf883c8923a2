"""What goes between the front and a replica, and an application called without a network."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

from starlette.types import ASGIApp, Message, Scope

log = logging.getLogger("mor.server")

# Of a scope, what is plain and what the application reads.
_PLAIN = (
    "type", "asgi", "http_version", "method", "scheme", "path", "raw_path", "query_string",
    "root_path", "headers", "client", "server",
)  # fmt: skip


@dataclass(frozen=True)
class Call:
    """One request on its way to a replica.

    Attributes:
        scope: of ASGI, plain values only.
        body: whole.
        blocks: hashes of the prompt's beginning; see :func:`mor.server.ray.prefixes.blocks_of`.
        avoid: replicas that have refused or lost it.
    """

    scope: dict[str, Any]
    body: bytes
    blocks: tuple[int, ...] = ()
    avoid: tuple[str, ...] = ()


def plain_scope(scope: Scope) -> dict[str, Any]:
    """The part of a scope that another process can be sent."""
    return {name: scope[name] for name in _PLAIN if name in scope}


async def call_app(app: ASGIApp, call: Call) -> AsyncIterator[list[Message]]:
    """What ``app`` answers, as many messages at a time as there are.

    Where the iteration is closed or cancelled, the application sees the client go away.
    """
    out: asyncio.Queue[Message | None] = asyncio.Queue()
    gone = asyncio.Event()
    body: list[Message] = [{"type": "http.request", "body": call.body, "more_body": False}]

    async def receive() -> Message:
        if body:
            return body.pop()
        await gone.wait()
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        out.put_nowait(message)

    async def work() -> None:
        try:
            await app(dict(call.scope), receive, send)
        except Exception:  # the application has answered 500 by then, or has not answered at all
            log.exception("a request failed")
        finally:
            out.put_nowait(None)

    working = asyncio.create_task(work())
    over = False
    try:
        while not over:
            ready = [await out.get()]
            while not out.empty():
                ready.append(out.get_nowait())
            over = ready[-1] is None
            messages = [message for message in ready if message is not None]
            if messages:
                yield messages
    finally:
        gone.set()
        if not over:
            working.cancel()
