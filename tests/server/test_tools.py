"""Functions: calls read from a text, forced by a grammar, and as libraries take them."""

from __future__ import annotations

import copy
import json
from typing import Any, Literal

import pytest
from openai import pydantic_function_tool
from pydantic import BaseModel
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from tests.server.calls import calls_of
from tests.server.live import NAME, Live, make_engine, serving
from tests.server.test_errors import problem
from tests.server.test_fields import read_events

CHAT = "/v1/chat/completions"
TURNS: Any = [{"role": "user", "content": "who?"}]


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
