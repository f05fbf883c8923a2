"""Calls as models write them."""

from __future__ import annotations

from typing import Any

CALL = '{"name": "f", "arguments": {"a": "}\\"{", "b": {"c": [1]}}}'
ARGUMENTS = '{"a": "}\\"{", "b": {"c": [1]}}'


def calls_of(message: dict[str, Any]) -> list[tuple[str, str]]:
    made = [call["function"] for call in message.get("tool_calls", [])]
    return [(one["name"], one["arguments"]) for one in made]
