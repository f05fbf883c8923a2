"""How a chat template lets a model write calls of functions."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mor.server.structure.sources import Source, json_rule, quote

MAX_FORCED = 8  # calls in one answer where calls are forced


@dataclass(frozen=True)
class Form:
    """Where calls stand in a text, and how one is written.

    Attributes:
        name: what it is called.
        begin, end: what stands before and after each call. Where ``begin`` is empty, an answer
            is either calls alone, from its first character, or text alone.
        arguments: the key of a call's arguments, when calls are forced.
        opening, between, closing: what stands before, between and after all calls.
    """

    name: str
    begin: str
    end: str
    arguments: str
    opening: str = ""
    between: str = "\n"
    closing: str = ""


HERMES = Form("hermes", "<tool_call>", "</tool_call>", "arguments")
LLAMA = Form("llama", "", "", "parameters", between="; ")
MISTRAL = Form("mistral", "", "", "arguments", "[", ", ", "]")


def find_form(template: str) -> Form | None:
    """The form that a chat template teaches: None where it does not know functions.

    Qwen's and Hermes' tags with JSON in them, a JSON list (Mistral), or a JSON object, as Llama 3
    has it.
    """
    if not re.search(r"\btools\b", template):
        return None
    if "<tool_call>" in template:
        return None if "<function=" in template else HERMES
    return MISTRAL if "[TOOL_CALLS]" in template else LLAMA


def arguments_schema(parameters: dict[str, Any] | None) -> dict[str, Any]:
    """The schema of a function's arguments, which are an object; without one there are none."""
    if parameters is None:
        return {"type": "object", "properties": {}, "additionalProperties": False}
    says = {"type", "$ref", "anyOf", "oneOf", "allOf", "enum", "const"}
    return parameters if says & set(parameters) else parameters | {"type": "object"}


def calls_source(
    form: Form,
    functions: Sequence[tuple[str, str, dict[str, Any] | None]],
    several: bool,
    special: Mapping[str, int],
) -> Source:
    """The grammar of an answer that is calls and nothing else.

    Args:
        form: how a call is written.
        functions: of each that may be called: the request's field that holds its parameters, its
            name, and the parameters.
        several: whether there may be more than one call.
        special: ids of special tokens, by their text: these are no text to the grammar.
    """
    rules: dict[str, str] = {}
    parts: dict[str, str] = {}
    for place, (field, name, parameters) in enumerate(functions):
        schema = json_rule(arguments_schema(parameters))
        head = f'{{"name": {quote(name)}, "{form.arguments}": '
        rules[f"body_{place}"] = f'{quote(head)} args_{place} "}}"'
        rules[f"args_{place}"] = f"%json {schema}"
        parts[field] = schema
    bodies = " | ".join(f"body_{place}" for place in range(len(functions)))
    rules["body"] = bodies

    def mark(text: str, before: str = "", after: str = "") -> str:
        if text in special:
            pieces = [quote(before) if before else "", f"<[{special[text]}]>"]
            return " ".join([*pieces, quote(after) if after else ""]).strip()
        return quote(before + text + after)

    one = "body"
    if form.begin:
        one = f"{mark(form.begin, after=chr(10))} body {mark(form.end, before=chr(10))}"
    rules["call"] = one
    start = "call"
    if several:
        start += f" ({quote(form.between)} call){{0,{MAX_FORCED - 1}}}"
    if form.opening:
        start = f"{quote(form.opening)} {start} {quote(form.closing)}"
    if form is MISTRAL and "[TOOL_CALLS]" in special:
        start = f"{mark('[TOOL_CALLS]')} {start}"
    return Source("tools", start, rules, parts=parts)
