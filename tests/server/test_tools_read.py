"""Calls read from a text, piece by piece."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mor.server.structure.forms import HERMES, LLAMA, MISTRAL, Form, find_form
from mor.server.structure.messages import next_delta, whole_message
from mor.server.structure.reader import CallReader
from mor.server.tokens import Tokens
from tests.server.calls import ARGUMENTS, CALL, calls_of
from tests.server.live import make_engine, tokenizer

# Read from a text --------------------------------------------------------------------------------

READ: list[tuple[Form, str, str | None, list[tuple[str, str]]]] = [
    (HERMES, f"<tool_call>\n{CALL}\n</tool_call>", None, [("f", ARGUMENTS)]),
    (HERMES, f" hi <b> \n<tool_call>{CALL}</tool_call>\n\n<tool_call>{CALL}</tool_call> so",
     " hi <b>so", [("f", ARGUMENTS), ("f", ARGUMENTS)]),
    (HERMES, '<tool_call>{"arguments": {"a": 1}, "name": "g"}</tool_call>', None,
     [("g", '{"a": 1}')]),
    (HERMES, '<tool_call>{"name": "g", "arguments": "{}"}</tool_call>', None, [("g", "{}")]),
    (HERMES, '<tool_call>{"name": "g"}</tool_call>', None, [("g", "{}")]),
    (HERMES, '<tool_call>{"name": "g", "arguments": {"a": 1', None, [("g", '{"a": 1')]),
    (HERMES, '<tool_call>{"name": "g", "arguments": {}} and', "and", [("g", "{}")]),
    (HERMES, '<tool_call>{"name": "none", "arguments": {}}</tool_call> x',
     '<tool_call>{"name": "none", "arguments": {}}</tool_call> x', []),
    (HERMES, "<tool_call>\nno JSON</tool_call>", "<tool_call>\nno JSON</tool_call>", []),
    (HERMES, "a <tool_ca b <tool_call", "a <tool_ca b <tool_call", []),
    (HERMES, " \n ", " \n ", []),
    (HERMES, "", "", []),
    (LLAMA, CALL, None, [("f", ARGUMENTS)]),
    (LLAMA, '{"type": "function", "name": "f", "parameters": {}}; {"name": "g", "parameters": {}}',
     None, [("f", "{}"), ("g", "{}")]),
    (LLAMA, '{"parameters": {"a": 2}, "name": "g"}', None, [("g", '{"a": 2}')]),
    (LLAMA, '{"name": "John", "age": 3}', '{"name": "John", "age": 3}', []),
    (LLAMA, ' {"answer": 5}', ' {"answer": 5}', []),
    (LLAMA, f"see {CALL}", f"see {CALL}", []),
    (LLAMA, '{"name": "f", "par', '{"name": "f", "par', []),
    (MISTRAL, f"[{CALL}, {CALL}]", None, [("f", ARGUMENTS), ("f", ARGUMENTS)]),
    (MISTRAL, "[1, 2]", "[1, 2]", []),
    (MISTRAL, '[{"x": 1}]', '[{"x": 1}]', []),
]  # fmt: skip


@pytest.mark.parametrize(("form", "text", "content", "calls"), READ)
def test_calls_are_read(
    form: Form, text: str, content: str | None, calls: list[tuple[str, str]]
) -> None:
    message = whole_message(text, CallReader(form, {"f", "g"}))
    assert (message["content"], calls_of(message)) == (content, calls)


@given(case=st.sampled_from(READ), data=st.data())
def test_pieces_of_any_size_give_the_same(case: Any, data: st.DataObject) -> None:
    form, text, content, calls = case
    cuts = data.draw(st.lists(st.integers(0, len(text)), max_size=20).map(sorted))
    reader, told, made = CallReader(form, {"f", "g"}), "", {}
    ends = [*cuts, len(text)]
    for start, end in zip([0, *cuts], ends, strict=True):
        delta = next_delta(text[start:end], reader, over=False)
        told = note(delta, told, made)
    told = note(next_delta("", reader, over=True), told, made)
    assert told == (content or "")
    assert [(one["name"], one["arguments"]) for one in made.values()] == calls


def note(delta: dict[str, Any], told: str, made: dict[int, dict[str, str]]) -> str:
    """As clients do: the first chunk of a call names it, later ones add to its arguments."""
    for call in delta.get("tool_calls", []):
        function = call["function"]
        if call["index"] not in made:
            assert call["id"].startswith("call_")
            assert call["type"] == "function"
            made[call["index"]] = {"name": function["name"], "arguments": ""}
        made[call["index"]]["arguments"] += function["arguments"]
    return told + delta.get("content", "")


def test_only_the_first_call_where_there_may_be_one() -> None:
    text = f"<tool_call>{CALL}</tool_call><tool_call>{CALL}</tool_call>"
    message = whole_message(text, CallReader(HERMES, {"f"}, several=False))
    assert calls_of(message) == [("f", ARGUMENTS)]


def test_a_long_answer_costs_no_more_per_token() -> None:
    reader = CallReader(HERMES, {"f"})
    told = "".join(p.text for _ in range(20_000) for p in reader.feed("a < b "))
    assert len(told) > 119_000


@pytest.mark.parametrize(
    ("template", "form"),
    [
        ("{% if tools %}<tool_call>{{ tools }}", HERMES),
        ("{% for t in tools %}<tool_call><function={{ t }}>", None),
        ("{{ tools }} [TOOL_CALLS]", MISTRAL),
        ('{{ tools }} {"name": function name, "parameters": ...}', LLAMA),
        ("{{ messages }} with toolset", None),
    ],
)
def test_the_template_tells_the_form(template: str, form: Form | None) -> None:
    assert find_form(template) is form


def test_a_tokenizer_may_have_a_template_for_tools() -> None:
    two = {"default": "{{ messages[0].content }}", "tool_use": "<tool_call>{{ tools }}"}
    named = copy.deepcopy(tokenizer())
    named.chat_template = two
    tokens = Tokens(named, make_engine().config)
    assert (tokens.template, tokens.tool_template) == (two["default"], two["tool_use"])
    assert tokens.form is HERMES
