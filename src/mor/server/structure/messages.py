"""Content and calls of functions as the API shows them, in messages and in chunks of a stream."""

from __future__ import annotations

import uuid
from typing import Any

from mor.server.structure.reader import CallReader, Piece


def whole_message(text: str, reader: CallReader | None) -> dict[str, Any]:
    """``content`` and ``tool_calls`` of a message that is complete."""
    if reader is None:
        return {"content": text}
    content = ""
    calls: list[dict[str, Any]] = []
    for piece in reader.feed(text, over=True):
        if piece.call is None:
            content += piece.text
        elif piece.name is not None:
            calls.append(_call(piece))
        else:
            calls[piece.call]["function"]["arguments"] += piece.text
    if not calls:
        return {"content": content}
    return {"content": content or None, "tool_calls": calls}


def next_delta(text: str, reader: CallReader | None, over: bool) -> dict[str, Any]:
    """The same of what a message grew by: the ``delta`` of one chunk.

    Args:
        text: what the answer grew by.
        reader: of this answer.
        over: whether that was all.
    """
    if reader is None:
        return {"content": text}
    content = ""
    calls: dict[int, dict[str, Any]] = {}
    for piece in reader.feed(text, over=over):
        if piece.call is None:
            content += piece.text
        elif piece.name is not None:
            calls[piece.call] = {"index": piece.call} | _call(piece)
        else:
            new: dict[str, Any] = {"index": piece.call, "function": {"arguments": ""}}
            call = calls.setdefault(piece.call, new)
            call["function"]["arguments"] += piece.text
    delta: dict[str, Any] = {"content": content} if content or not calls else {}
    return delta | ({"tool_calls": [*calls.values()]} if calls else {})


def _call(piece: Piece) -> dict[str, Any]:
    return {
        "id": f"call_{uuid.uuid4().hex[:24]}",
        "type": "function",
        "function": {"name": piece.name, "arguments": piece.text},
    }
