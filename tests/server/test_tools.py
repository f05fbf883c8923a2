"""Functions: calls read from a text, forced by a grammar, and as libraries take them."""

from __future__ import annotations

import copy
import json
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai import pydantic_function_tool
from pydantic import BaseModel
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from mor.server.structure.forms import HERMES, LLAMA, MISTRAL, Form, find_form
from mor.server.structure.messages import next_delta, whole_message
from mor.server.structure.reader import CallReader
from mor.server.tokens import Tokens
from tests.server.live import NAME, Live, make_engine, serving, tokenizer
from tests.server.test_errors import problem
from tests.server.test_fields import read_events

CHAT = "/v1/chat/completions"
TURNS: Any = [{"role": "user", "content": "who?"}]
CALL = '{"name": "f", "arguments": {"a": "}\\"{", "b": {"c": [1]}}}'
ARGUMENTS = '{"a": "}\\"{", "b": {"c": [1]}}'


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


def calls_of(message: dict[str, Any]) -> list[tuple[str, str]]:
    made = [call["function"] for call in message.get("tool_calls", [])]
    return [(one["name"], one["arguments"]) for one in made]


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


# Forced ------------------------------------------------------------------------------------------


class Crown(BaseModel):
    """Give or take the crown."""

    who: Literal["king", "queen"]


class Ask(BaseModel):
    """Ask a question."""

    loud: bool


TOOLS: Any = [pydantic_function_tool(Crown), pydantic_function_tool(Ask)]


def forced(**fields: Any) -> dict[str, Any]:
    start = {"model": NAME, "messages": TURNS, "tools": TOOLS, "temperature": 0}
    return start | {"tool_choice": "required", "parallel_tool_calls": False} | fields


def test_a_call_that_must_be(caller: Live) -> None:
    pytest.importorskip("llguidance")
    client = caller.openai()
    choice = client.chat.completions.create(**forced()).choices[0]
    assert (choice.finish_reason, choice.message.content) == ("tool_calls", None)
    (call,) = choice.message.tool_calls or []
    model = {"Crown": Crown, "Ask": Ask}[call.function.name]
    model.model_validate_json(call.function.arguments)
    for name, kind in (("Crown", Crown), ("Ask", Ask)):
        named = {"type": "function", "function": {"name": name}}
        answer = client.chat.completions.parse(**forced(tool_choice=named))
        (one,) = answer.choices[0].message.tool_calls or []
        assert one.function.name == name
        assert isinstance(one.function.parsed_arguments, kind)
        history = [*TURNS, answer.choices[0].message.model_dump(),
                   {"role": "tool", "tool_call_id": one.id, "content": "done"}]  # fmt: skip
        assert client.chat.completions.create(
            model=NAME, messages=history, tools=TOOLS, max_tokens=2, temperature=0
        ).choices


def test_a_stream_of_a_call(caller: Live) -> None:
    pytest.importorskip("llguidance")
    client = caller.openai()
    whole = client.chat.completions.create(**forced()).choices[0].message.tool_calls or []
    with client.chat.completions.stream(**forced()) as stream:
        kinds = {event.type for event in stream}
        final = stream.get_final_completion().choices[0]
    assert "tool_calls.function.arguments.delta" in kinds
    assert final.finish_reason == "tool_calls"
    (told,), (call,) = final.message.tool_calls or [], whole
    assert (told.function.name, told.function.arguments) == (
        call.function.name, call.function.arguments,
    )  # fmt: skip
    with caller.http() as http:
        chunks = read_events(http, CHAT, forced(stream=True, return_token_ids=True))
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert all(len(chunk["choices"][0]["depths"]) == 1 for chunk in chunks[1:])
    assert sum("tool_calls" in delta for delta in deltas) > 2  # arguments come as they are written


def test_several_calls_and_a_length(caller: Live) -> None:
    pytest.importorskip("llguidance")
    choice = (
        caller.openai()
        .chat.completions.create(**forced(parallel_tool_calls=None, temperature=1, seed=1))
        .choices[0]
    )
    calls = choice.message.tool_calls or []
    assert 1 <= len(calls) <= 8
    for call in calls:
        json.loads(call.function.arguments)
    cut = caller.openai().chat.completions.create(**forced(max_tokens=4)).choices[0]
    assert cut.finish_reason == "length"


def test_no_calls_where_none_are_wanted(caller: Live) -> None:
    client = caller.openai()
    plain = client.chat.completions.create(model=NAME, messages=TURNS, temperature=0, max_tokens=4)
    none = client.chat.completions.create(**forced(tool_choice="none", max_tokens=4))
    assert none.usage is not None
    assert plain.usage is not None
    # The prompt does not name them either. How much of it was cached hangs on what came before.
    assert none.usage.prompt_tokens == plain.usage.prompt_tokens
    assert none.usage.completion_tokens == plain.usage.completion_tokens
    auto = client.chat.completions.create(**forced(tool_choice="auto", max_tokens=4))
    assert auto.usage is not None
    assert auto.usage.prompt_tokens > plain.usage.prompt_tokens
    assert auto.choices[0].message.tool_calls is None


def test_a_form_or_calls(caller: Live) -> None:
    pytest.importorskip("llguidance")
    body = forced(tool_choice="auto", guided_choice=["no"])
    with caller.http() as http:
        message = http.post(CHAT, json=body).json()["choices"][0]["message"]
        assert message.get("tool_calls") or message["content"] == "no"
        mixed = problem(http.post(CHAT, json=forced(tool_choice="auto", guided_regex="a")), 400)
    assert (mixed["param"], mixed["code"]) == ("guided_regex", "unsupported_parameter")


def test_a_wrong_schema_of_a_function_is_named(caller: Live) -> None:
    pytest.importorskip("llguidance")
    wrong = {"type": "function", "function": {"name": "f", "parameters": {"type": "objekt"}}}
    with caller.http() as http:
        found = problem(http.post(CHAT, json=forced(tools=[*TOOLS, wrong])), 400)
    assert found["param"] == "tools[2].function.parameters"
    assert "objekt" in found["message"]


@pytest.mark.parametrize("form", ["llama", "mistral", "special"])
def test_other_forms_and_marks_that_are_special_tokens(form: str) -> None:
    pytest.importorskip("llguidance")
    start = "{{ messages[0].content }}{% if tools %}y{% endif %}"
    templates = {
        "llama": '{"name": ..., "parameters": ...}',
        "mistral": "[TOOL_CALLS]",
        "special": "<tool_call>",
    }
    engine = make_engine(512)
    if form == "special":
        engine.tokenizer = copy.deepcopy(engine.tokenizer)
        rules = engine.tokenizer
        # In the place of tokens that there are: the model's vocabulary stays as it is.
        data = json.loads(rules.backend_tokenizer.to_str())
        for old, new in ((len(rules) - 1, "<tool_call>"), (len(rules) - 2, "</tool_call>")):
            entry = {"id": old, "content": new, "special": True, "single_word": False,
                     "lstrip": False, "rstrip": False, "normalized": False}  # fmt: skip
            data["added_tokens"].append(entry)
            vocabulary = data["model"]["vocab"]
            gone = next(text for text, token in vocabulary.items() if token == old)
            del vocabulary[gone]
            vocabulary[new] = old
            data["model"]["merges"] = [
                pair for pair in data["model"]["merges"] if "".join(pair) != gone
            ]
        engine.tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer.from_str(json.dumps(data)),
            eos_token="<|endoftext|>", bos_token="<|endoftext|>",
            additional_special_tokens=["<tool_call>", "</tool_call>"],
        )  # fmt: skip
        object.__setattr__(engine.intake, "tokenizer", engine.tokenizer)
    short = [{"type": "function", "function": {"name": "f"}}]
    with serving(engine, chat_template=start + templates[form]) as live:
        choice = live.openai().chat.completions.create(**forced(tools=short)).choices[0]
    assert calls_of(choice.message.model_dump()) == [("f", "{}")]
    assert (choice.message.content, choice.finish_reason) == (None, "tool_calls")


# LangChain ---------------------------------------------------------------------------------------


def test_langchain(caller: Live) -> None:
    pytest.importorskip("llguidance")
    langchain = pytest.importorskip("langchain_openai")
    model = langchain.ChatOpenAI(
        model=NAME, base_url=f"{caller.url}/v1", api_key="none", temperature=0, max_retries=0
    )
    for method in ("json_schema", "function_calling"):
        found = model.with_structured_output(Crown, method=method).invoke("who?")
        assert isinstance(found, Crown)
    bound = model.bind_tools([Crown, Ask], tool_choice="any", parallel_tool_calls=False)
    message = bound.invoke("who?")
    (call,) = message.tool_calls
    assert call["name"] in ("Crown", "Ask")
    parts = list(bound.stream("who?"))
    streamed = parts[0]
    for part in parts[1:]:
        streamed = streamed + part
    assert [(c["name"], c["args"]) for c in streamed.tool_calls] == [(call["name"], call["args"])]
    from langchain_core.messages import HumanMessage, ToolMessage

    history = [HumanMessage("who?"), message, ToolMessage("done", tool_call_id=call["id"])]
    assert model.bind_tools([Crown]).invoke(history, max_tokens=2).response_metadata
