"""What an answer must look like, in the grammar library's own language (a Lark dialect).

The language: https://github.com/guidance-ai/llguidance/blob/main/docs/syntax.md
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

MAX_SOURCE = 256 << 10
# One line, a blank after commas and colons or none: weak models write white space for ever.
_SPACE = {"whitespace_flexible": False, "item_separator": ", ?", "key_separator": ": ?"}
ANY_OBJECT: dict[str, Any] = {"type": "object"}


@dataclass(frozen=True)
class Source:
    """A grammar as text.

    Attributes:
        name: the request's field that asks for it.
        rules: further rules, by name.
        start: what the whole answer is.
        kind: ``lark``; or ``regex``, or ``gbnf`` (which may be Lark too): then ``start`` is the
            whole text.
        parts: JSON schemas within it, by the field that holds each, so that a fault can be named.
    """

    name: str
    start: str
    rules: Mapping[str, str] = field(default_factory=dict)
    kind: str = "lark"
    parts: Mapping[str, str] = field(default_factory=dict)

    @property
    def text(self) -> str:
        """The grammar."""
        if self.kind != "lark":
            return self.start
        rules = "".join(f"\n{name}: {rule}" for name, rule in self.rules.items())
        return f"start: {self.start}{rules}"


def quote(text: str) -> str:
    """A text as the grammar writes it."""
    return json.dumps(text)


def json_rule(schema: Any) -> str:
    """JSON by a schema, as the grammar writes it; how white space is treated is ours to say."""
    if isinstance(schema, dict):
        schema = schema | {"x-guidance": _SPACE}
    return json.dumps(schema)


def from_schema(name: str, schema: Any) -> Source:
    """JSON by a schema."""
    text = json_rule(schema)
    return Source(name, f"%json {text}", parts={name: text})


def from_choice(name: str, choices: Sequence[str]) -> Source:
    """One of some texts."""
    return Source(name, " | ".join(map(quote, dict.fromkeys(choices))))


def from_regex(name: str, pattern: str) -> Source:
    """A regular expression that the whole answer matches."""
    return Source(name, pattern, kind="regex")


def from_grammar(name: str, grammar: str) -> Source:
    """GBNF or Lark."""
    return Source(name, grammar, kind="gbnf")
