"""Bodies of requests: JSON is read, what is none is refused, and no shape costs much."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request
from fastapi.responses import Response
from fastapi.routing import APIRoute
from pydantic_core import from_json

from mor.server.errors import ApiError, too_long
from mor.server.state import State

MAX_DEPTH = 200  # arrays and objects within each other; about as deep as pydantic reads JSON
MAX_CONTAINERS = 1 << 16  # arrays and objects in all: a million take Python a second
MAX_PIECES = 8192  # parts and calls of all messages, some 10 microseconds each
_HALF = re.compile(rb"\\u[dD][89abAB][0-9a-fA-F]{2}")
_TEXT = re.compile(
    rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"?', re.DOTALL
)  # its end may be missing: no second try
_JSON = re.compile(r"application/(?:[\w.+-]+\+)?json", re.IGNORECASE)


def parse_json(body: bytes) -> Any:
    """What ``body`` says.

    It may be UTF-8, 16 or 32, with a byte order mark or without.

    Raises:
        ApiError: 400 ``invalid_json``: no JSON, no such characters, numbers that are infinite or
            of more digits than Python reads, nested more than about 200 deep, or more than 65,536
            arrays and objects.
    """
    try:
        encoding = json.detect_encoding(body)
        if encoding != "utf-8":
            body = body.decode(encoding).encode()
        _check_containers(body)
        try:
            return from_json(body, allow_inf_nan=False)
        except ValueError:
            # Half of a surrogate pair is JSON; the fields themselves say that they cannot take it.
            if not _HALF.search(body):
                raise
        return _check_depth(json.loads(body, parse_constant=_no_number))
    except (ValueError, RecursionError) as error:
        why = " ".join(str(error).split())[:200]
        raise ApiError(400, f"The body is not valid JSON: {why}", code="invalid_json") from None


def _no_number(name: str) -> None:
    raise ValueError(f"{name} is no number")


def _check_containers(body: bytes) -> None:
    """Count arrays and objects before any is made."""
    if body.count(b"[") + body.count(b"{") <= MAX_CONTAINERS:
        return
    bare = _TEXT.sub(b"", body)  # most of them may be characters of a text
    count = bare.count(b"[") + bare.count(b"{")
    if count > MAX_CONTAINERS:
        raise ValueError(f"{count} arrays and objects; at most {MAX_CONTAINERS} are read")


def _check_depth(content: Any) -> Any:
    level = [content]
    for _ in range(MAX_DEPTH + 1):
        inner: list[Any] = []
        for one in level:
            if isinstance(one, (list, dict)):
                inner += one.values() if isinstance(one, dict) else one
        if not inner:
            return content
        level = inner
    raise ValueError("recursion limit exceeded")


def check_type(request: Request) -> None:
    """Refuse a body that says it is something else than JSON, or comes from a page without a word.

    A browser lets any page send a body of another type, or without one, to any server; it says
    then where the page is from (``Origin``).

    Raises:
        ApiError: 400, saying which header is missing or wrong.
    """
    told = request.headers.get("content-type", "").partition(";")[0].strip()
    if _JSON.fullmatch(told) or (not told and "origin" not in request.headers):
        return
    found = f"is {told[:80]!a}" if told else "is missing"
    raise ApiError(
        400,
        f"The header Content-Type {found}; send Content-Type: application/json",
        code="invalid_content_type",
    )


def check_length(content: Any, most: int) -> None:
    """Refuse token ids or messages that are more than fit, before each of them is looked at.

    Raises:
        ApiError: 400 ``context_length_exceeded``; or ``invalid_value`` for messages of very many
            parts or calls.
    """
    if not isinstance(content, dict):
        return
    prompt, messages = content.get("prompt"), content.get("messages")
    if isinstance(prompt, list) and len(prompt) > most and type(prompt[0]) is int:
        raise too_long("prompt", f"has {len(prompt)} tokens", most)
    if isinstance(messages, list) and len(messages) > most:  # each takes one token at the least
        raise too_long("messages", f"has {len(messages)} messages", most)
    if isinstance(messages, list):
        pieces = sum(map(_count_pieces, messages))
        if pieces > MAX_PIECES:
            raise ApiError(
                400,
                f"messages hold {pieces} parts and tool calls; at most {MAX_PIECES} are read",
                param="messages",
                code="invalid_value",
            )


def _count_pieces(message: Any) -> int:
    if not isinstance(message, dict):
        return 0
    lists = (message.get(name) for name in ("content", "tool_calls"))
    return sum(len(one) for one in lists if isinstance(one, list))


class _Parsed(Request):
    """A request whose JSON is read already."""

    content: Any = None

    async def json(self) -> Any:
        return self.content


class JsonRoute(APIRoute):
    """A path that takes JSON."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """The handler, behind the reading of the body."""
        handle = super().get_route_handler()
        if self.body_field is None:
            return handle

        async def read(request: Request) -> Response:
            others = [pair for pair in request.scope["headers"] if pair[0] != b"content-type"]
            headers = [*others, (b"content-type", b"application/json")]
            known = _Parsed({**request.scope, "headers": headers}, request.receive)
            if body := await known.body():
                known.content = parse_json(body)
                check_type(request)
                if isinstance(state := request.app.state.mor, State):  # it reads tokens
                    check_length(known.content, state.engine.max_model_len)
            return await handle(known)

        return read
