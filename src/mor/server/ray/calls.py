"""What goes between the front and a replica, and an application called without a network."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

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
        front: who asks; "" where no link may carry the answer.
        ticket: of the answer in a link.
    """

    scope: dict[str, Any]
    body: bytes
    blocks: tuple[int, ...] = ()
    avoid: tuple[str, ...] = ()
    front: str = ""
    ticket: int = 0


class Taken(NamedTuple):
    """A replica's word that it works on a request.

    Attributes:
        replica: its name.
        link: the number of the link that carries the answer; None where this stream does.
    """

    replica: str
    link: int | None = None


def plain_scope(scope: Scope) -> dict[str, Any]:
    """The part of a scope that another process can be sent."""
    return {name: scope[name] for name in _PLAIN if name in scope}


def add_message(messages: list[Message | None], message: Message) -> None:
    """Put a message behind others: a piece of a body joins the piece before it."""
    last = messages[-1] if messages else None
    body = "http.response.body"
    if last is not None and last["type"] == message["type"] == body and last.get("more_body"):
        joined = last.get("body", b"") + message.get("body", b"")
        messages[-1] = {**message, "body": joined}
    else:
        messages.append(message)


async def run_app(app: ASGIApp, call: Call, put: Callable[[Message], None]) -> None:
    """Have ``app`` answer; each of its messages is ``put`` where it belongs, at once.

    Where this is cancelled, the application sees the client go away.
    """
    gone = asyncio.Event()
    body: list[Message] = [{"type": "http.request", "body": call.body, "more_body": False}]

    async def receive() -> Message:
        if body:
            return body.pop()
        await gone.wait()
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        put(message)

    try:
        await app(dict(call.scope), receive, send)
    except Exception:  # the application has answered 500 by then, or has not answered at all
        log.exception("a request failed")


async def call_app(app: ASGIApp, call: Call) -> AsyncIterator[list[Message]]:
    """What ``app`` answers, as many messages at a time as there are.

    Where the iteration is closed or cancelled, the application is cancelled.
    """
    out: asyncio.Queue[Message | None] = asyncio.Queue()
    working = asyncio.create_task(run_app(app, call, out.put_nowait))
    working.add_done_callback(lambda _: out.put_nowait(None))
    over = False
    try:
        while not over:
            ready: list[Message | None] = []
            message = await out.get()
            while message is not None:
                add_message(ready, message)
                if out.empty():
                    break
                message = out.get_nowait()
            over = message is None
            messages = [message for message in ready if message is not None]
            if messages:
                yield messages
    finally:
        if not over:
            working.cancel()
