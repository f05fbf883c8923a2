"""For pages of other origins, and for ``HEAD``: what stands before everything else."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from urllib.parse import urlsplit

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mor.errors import MorError

CORS: dict[str, Any] = {
    "allow_methods": ["GET", "HEAD", "POST", "OPTIONS"],
    "allow_headers": ["*"],
    "expose_headers": ["Retry-After", "WWW-Authenticate"],
    "max_age": 3600,
}


def check_origins(origins: Sequence[str]) -> None:
    """Refuse what no browser sends as its origin.

    Raises:
        MorError: an origin that is neither ``*`` nor a scheme with a host, and a port perhaps.
    """
    for origin in origins:
        try:
            parts = urlsplit(origin)
            plain = f"{parts.scheme}://{parts.netloc}"
            right = bool(parts.scheme and parts.hostname) and "@" not in parts.netloc
            _ = parts.port
        except ValueError:
            plain, right = "", False
        if origin != "*" and not (right and origin == plain.lower()):
            raise MorError(
                f"cors_origin={origin!r} must be * or an origin such as http://localhost:3000: "
                "scheme, host and port in lower case, without a path or a slash at the end"
            )


class Head:
    """``HEAD`` wherever there is ``GET``: the same answer without its body.

    Args:
        app: what stands behind.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Ask as ``GET``, and leave the body out."""
        if scope["type"] != "http" or scope["method"] != "HEAD":
            await self.app(scope, receive, send)
            return

        async def bare(message: Message) -> None:
            if message["type"] == "http.response.body":
                message = dict(message) | {"body": b""}
            await send(message)

        await self.app(dict(scope) | {"method": "GET"}, receive, bare)
