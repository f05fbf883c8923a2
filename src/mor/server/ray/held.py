"""An answer's first messages, held back until there is something that cannot be taken back."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from starlette.types import Message, Send

# What an error event before the first token says where another replica may do better.
ELSEWHERE = frozenset({"engine_restarted", "not_ready", "shutting_down"})
REFUSED = frozenset({429, 503})


class Held:
    """Passes an answer on: a stream from its first token, anything else once it is whole.

    Args:
        send: of ASGI, to the client.

    Attributes:
        sent: whether the client has seen any of it.
        streaming: whether it is a stream of events.
        complete: whether its last message has come.
        retryable: whether it is a refusal that another replica might not give.
    """

    def __init__(self, send: Send) -> None:
        self._send = send
        self._waiting: list[Message] = []
        self.sent = self.streaming = self.complete = self.retryable = False

    async def take(self, messages: Sequence[Message]) -> None:
        """The next messages of the answer."""
        for message in messages:
            self._waiting.append(message)
            if message["type"] == "http.response.start":
                headers = dict(message["headers"])
                kind = headers.get(b"content-type", b"")
                self.streaming = kind.startswith(b"text/event-stream")
                self.retryable = message["status"] in REFUSED
                continue
            if self.streaming and not self.sent and not self.retryable:
                self._look_at(message.get("body", b""))
            self.complete = not message.get("more_body", False)
        if self.sent or (self.complete and not self.retryable):
            await self.release()

    def _look_at(self, body: bytes) -> None:
        """What the first events say: an opening without a token may still be taken back."""
        for part in body.split(b"\n\n"):
            told = _event(part)
            error = told.get("error")
            if isinstance(error, dict):
                self.retryable = error.get("code") in ELSEWHERE
                self.sent = not self.retryable
                return
            if part and not _is_opening(told):
                self.sent = True
                return

    async def release(self) -> None:
        """Send all that was held back."""
        self.sent = True
        waiting, self._waiting = self._waiting, []
        for message in waiting:
            await self._send(message)


def _event(body: bytes) -> dict[str, Any]:
    try:
        told = json.loads(body.removeprefix(b"data: "))
    except ValueError:
        return {}
    return told if isinstance(told, dict) else {}


def _is_opening(event: dict[str, Any]) -> bool:
    """Whether an event of a stream only says who speaks, or repeats the prompt."""
    choices = event.get("choices")
    if not isinstance(choices, list) or not choices:
        return False
    return all(
        isinstance(one, dict) and one.get("depths") == [] and one.get("finish_reason") is None
        for one in choices
    )
