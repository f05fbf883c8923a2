"""OpenAI's own fields: known all of them, refused by name where they ask for what is not there."""

from __future__ import annotations

import json
import typing
from typing import Any

import httpx
import openai
import pytest
from openai.types import completion_create_params as legacy
from openai.types.chat import (
    ChatCompletionMessage,
    ChatCompletionMessageFunctionToolCall,
    ParsedChatCompletionMessage,
    ParsedFunctionToolCall,
    chat_completion_assistant_message_param,
    chat_completion_content_part_text_param,
    chat_completion_developer_message_param,
    chat_completion_function_message_param,
    chat_completion_function_tool_param,
    chat_completion_stream_options_param,
    chat_completion_system_message_param,
    chat_completion_tool_message_param,
    chat_completion_user_message_param,
    completion_create_params,
)
from openai.types.shared_params import (
    function_definition,
    response_format_json_object,
    response_format_json_schema,
    response_format_text,
)
from pydantic import BaseModel

from mor.server.schema.messages import CalledFunction, CallInHistory, Message, Part
from mor.server.schema.requests import ChatRequest, CompletionRequest, StreamOptions
from mor.server.schema.tools import Function, JsonSchema, ResponseFormat, Tool
from tests.server.live import NAME, Live
from tests.server.test_errors import problem

CHAT = "/v1/chat/completions"
TURNS = [{"role": "user", "content": "who?"}]


def documented(kind: Any) -> set[str]:
    """Names of the fields of a type of the ``openai`` package."""
    if issubclass(kind, BaseModel):
        return set(kind.model_fields)
    return set(typing.get_type_hints(kind))


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (ChatRequest, completion_create_params.CompletionCreateParamsStreaming),
        (CompletionRequest, legacy.CompletionCreateParamsStreaming),
        (StreamOptions, chat_completion_stream_options_param.ChatCompletionStreamOptionsParam),
        (Message, chat_completion_assistant_message_param.ChatCompletionAssistantMessageParam),
        (Message, chat_completion_developer_message_param.ChatCompletionDeveloperMessageParam),
        (Message, chat_completion_function_message_param.ChatCompletionFunctionMessageParam),
        (Message, chat_completion_system_message_param.ChatCompletionSystemMessageParam),
        (Message, chat_completion_tool_message_param.ChatCompletionToolMessageParam),
        (Message, chat_completion_user_message_param.ChatCompletionUserMessageParam),
        (Message, ChatCompletionMessage),
        (Message, ParsedChatCompletionMessage),
        (CallInHistory, ChatCompletionMessageFunctionToolCall),
        (CallInHistory, ParsedFunctionToolCall),
        (CalledFunction, ParsedFunctionToolCall.model_fields["function"].annotation),
        (Part, chat_completion_content_part_text_param.ChatCompletionContentPartTextParam),
        (Tool, chat_completion_function_tool_param.ChatCompletionFunctionToolParam),
        (Function, function_definition.FunctionDefinition),
        (ResponseFormat, response_format_text.ResponseFormatText),
        (ResponseFormat, response_format_json_object.ResponseFormatJSONObject),
        (ResponseFormat, response_format_json_schema.ResponseFormatJSONSchema),
        (JsonSchema, response_format_json_schema.JSONSchema),
    ],
)
def test_every_documented_field_is_known(ours: type[BaseModel], theirs: Any) -> None:
    known = {field.alias or name for name, field in ours.model_fields.items()}
    assert documented(theirs) - known == set()


HARMLESS: dict[str, Any] = {
    "store": True, "tools": [], "service_tier": "flex", "metadata": {"a": "b"},
    "reasoning_effort": "high", "parallel_tool_calls": True, "modalities": ["text"],
    "prediction": None, "safety_identifier": "x", "prompt_cache_key": "x", "user": "u",
    "prompt_cache_retention": "24h", "prompt_cache_options": {"mode": "implicit"},
    "verbosity": "low", "web_search_options": None, "audio": None, "function_call": "none",
    "functions": [], "moderation": None, "tool_choice": "none", "top_logprobs": 0,
    "logit_bias": {}, "stop": [], "seed": 5, "response_format": {"type": "text"},
}  # fmt: skip


def test_what_changes_nothing_is_accepted(live: Live) -> None:
    client = live.openai()
    plain = client.chat.completions.create(model=NAME, messages=TURNS, temperature=0, max_tokens=3)  # type: ignore[arg-type]
    again = client.chat.completions.create(
        model=NAME, messages=TURNS, temperature=0, max_tokens=3, **HARMLESS  # type: ignore[arg-type]
    )  # fmt: skip
    assert again.choices[0].message.content == plain.choices[0].message.content
    assert again.choices[0].message.tool_calls is None
    nothing = dict.fromkeys(set(ChatRequest.model_fields) - {"model", "messages"})
    with live.http() as http:
        body = {"model": NAME, "messages": TURNS} | nothing | {"max_tokens": 2}
        assert http.post(CHAT, json=body).status_code == 200
        nothing = dict.fromkeys(set(CompletionRequest.model_fields) - {"model", "prompt"})
        body = {"model": NAME, "prompt": "the", "suffix": ""} | nothing | {"max_tokens": 2}
        assert http.post("/v1/completions", json=body).status_code == 200


@pytest.mark.parametrize(
    "fields",
    [
        {"stop": ""}, {"stop": [""]}, {"stop": ["", "zzz"]}, {"stream_options": {}},
        {"stream_options": {"include_usage": False}}, {"response_format": {}}, {"suffix": ""},
        {"tool_choice": ""}, {"tool_choice": {}}, {"tools": []}, {"function_call": ""},
        {"modalities": []}, {"metadata": {}}, {"prediction": {}}, {"web_search_options": {}},
        {"audio": {}}, {"logit_bias": {}}, {"bad_words": []}, {"stop_token_ids": []},
        {"structured_outputs": {}}, {"chat_template_kwargs": {}}, {"best_of": 1},
    ],
    ids=str,
)  # fmt: skip
def test_what_is_empty_asks_for_nothing(live: Live, fields: dict[str, Any]) -> None:
    asked = 0
    for kind, start, path in (
        (ChatRequest, {"messages": TURNS}, CHAT),
        (CompletionRequest, {"prompt": "the"}, "/v1/completions"),
    ):
        if set(fields) <= set(kind.model_fields):
            asked += 1
            body = {"model": NAME, "temperature": 0, "max_tokens": 2} | start
            with live.http() as http:
                answers = [http.post(path, json=body | more) for more in ({}, fields)]
            assert answers[1].status_code == 200, answers[1].text
            assert answers[0].json()["choices"] == answers[1].json()["choices"]
    assert asked


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"audio": {"voice": "ash", "format": "wav"}}, "audio"),
        ({"function_call": {"name": "f"}}, "function_call"),
        ({"functions": [{"name": "f"}]}, "functions"),
        ({"modalities": ["text", "audio"]}, "modalities"),
        ({"moderation": {"model": "m"}}, "moderation"),
        ({"prediction": {"type": "content", "content": "x"}}, "prediction"),
        ({"web_search_options": {"search_context_size": "low"}}, "web_search_options"),
        ({"tools": [{"type": "custom", "custom": {"name": "f"}}]}, "tools[0]"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
            "messages[0].content",
        ),
        (
            {"messages": [*TURNS, {"role": "assistant", "content": None, "audio": {"id": "a"}}]},
            "messages[1].audio",
        ),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
        ({"tool_choice": {"type": "allowed_tools", "allowed_tools": {}}}, "tool_choice"),
    ],
)
def test_what_is_not_there_is_refused_by_name(
    live: Live, fields: dict[str, Any], param: str
) -> None:
    with live.http() as http:
        answer = http.post(CHAT, json={"model": NAME, "messages": TURNS} | fields)
    found = problem(answer, 400)
    assert (found["param"], found["code"]) == (param, "unsupported_parameter")
    assert found["message"].startswith(f"{param}: ")


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"service_teir": "auto"}, "service_teir", "unknown_field"),
        ({"stream": True, "stream_options": {"usage": True}}, "stream_options.usage",
         "unknown_field"),
        ({"messages": [{"role": "user", "content": "x", "contents": 1}]}, "messages[0].contents",
         "unknown_field"),
        ({"messages": [{"role": "user", "content": None}]}, "messages[0].content", "missing_field"),
        ({"messages": [{"role": "tool", "content": "5"}]}, "messages[0].tool_call_id",
         "missing_field"),
        ({"messages": [{"role": "function", "content": "5"}]}, "messages[0].name",
         "missing_field"),
        ({"messages": [{"role": "user", "content": "x", "refusal": "no"}]}, "messages[0].refusal",
         "invalid_value"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content",
         "missing_field"),
        ({"store": "yes"}, "store", "invalid_value"),
        ({"metadata": []}, "metadata", "invalid_value"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name",
         "invalid_value"),
        ({"tools": [{"type": "function", "function": {"name": "a"}}] * 2}, "tools",
         "invalid_value"),
        ({"tool_choice": "required"}, "tool_choice", "invalid_value"),
        ({"tool_choice": "always"}, "tool_choice", "invalid_value"),
        ({"tool_choice": {"type": "function", "function": {"name": "f"}}}, "tool_choice",
         "invalid_value"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema",
         "missing_field"),
        ({"continue_final_message": True, "add_generation_prompt": True},
         "continue_final_message", "invalid_value"),
        ({"chat_template_kwargs": {"tokenize": True}}, "chat_template_kwargs", "invalid_value"),
        ({"chat_template_kwargs": {"self": 1}}, "chat_template_kwargs", "invalid_value"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "messages", "invalid_value"),
        ({"tool_choice": {"type": "function", "function": {"nam": "f"}}}, "tool_choice",
         "invalid_value"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(live: Live, fields: dict[str, Any], param: str, code: str) -> None:
    with live.http() as http:
        answer = http.post(CHAT, json={"model": NAME, "messages": TURNS} | fields)
    found = problem(answer, 400)
    assert (found["param"], found["code"]) == (param, code), found


def test_answers_go_back_as_the_client_dumps_them(caller: Live) -> None:
    client = caller.openai()
    fields: dict[str, Any] = {"model": NAME, "temperature": 0, "max_tokens": 3}
    answer = client.chat.completions.create(messages=TURNS, **fields)  # type: ignore[arg-type]
    message = answer.choices[0].message
    for dumped in (message.model_dump(), message.model_dump(exclude_none=True), message):
        history: Any = [*TURNS, dumped, {"role": "user", "content": "and?"}]
        assert client.chat.completions.create(messages=history, **fields).choices
    call = {
        "id": "call_1", "type": "function", "index": 0,
        "function": {"name": "f", "arguments": '{"a": 1}', "parsed_arguments": {"a": 1}},
    }  # fmt: skip
    called = ParsedChatCompletionMessage(role="assistant", content=None).model_dump()
    history = [
        *TURNS,
        called | {"tool_calls": [call], "refusal": None, "annotations": [{"type": "x"}]},
        {"role": "tool", "tool_call_id": "call_1", "content": [{"type": "text", "text": "5"}]},
    ]
    with caller.http() as http:
        told = http.post(
            "/tokenize", json={"messages": history, "add_generation_prompt": False}
        ).json()
        text = http.post("/detokenize", json={"tokens": told["tokens"]}).json()["prompt"]
    assert text == 'user: who?assistant: <tool_call>f{"a": 1}</tool_call>tool: 5'


def test_older_calls_and_refusals_reach_the_template() -> None:
    old = {"name": "f", "arguments": "no JSON"}
    message = Message.model_validate({"role": "assistant", "content": None, "function_call": old})
    assert message.plain() == {
        "role": "assistant", "content": "",
        "tool_calls": [{"type": "function", "function": old}],
    }  # fmt: skip
    message = Message.model_validate({"role": "assistant", "content": None, "refusal": "never"})
    assert message.plain() == {"role": "assistant", "content": "never"}
    parts = [{"type": "refusal", "refusal": "a"}, {"type": "text", "text": "b"}]
    cached = {"cache_control": {"type": "ephemeral"}}
    message = Message.model_validate(
        {"role": "assistant", "content": [part | cached for part in parts]} | cached
    )
    assert message.plain()["content"] == "ab"
    result = {"role": "function", "name": "f", "content": None}
    assert Message.model_validate(result).plain() == {"role": "tool", "name": "f", "content": ""}


def test_usage_in_every_chunk(live: Live) -> None:
    fields: dict[str, Any] = {"model": NAME, "temperature": 0, "max_tokens": 4, "stream": True}
    options = {"include_usage": True, "continuous_usage_stats": True, "include_obfuscation": True}
    with live.http() as http:
        for path, start in ((CHAT, {"messages": TURNS}), ("/v1/completions", {"prompt": "the"})):
            body = fields | start | {"stream_options": options, "ignore_eos": True}
            chunks = read_events(http, path, body)
            counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
            assert counts == ([0] if path == CHAT else []) + [1, 2, 3, 4, 4]
            assert len({chunk["usage"]["prompt_tokens"] for chunk in chunks}) == 1
            alone = {"continuous_usage_stats": True}  # as vLLM: only beside include_usage
            chunks = read_events(http, path, body | {"stream_options": alone})
            assert all("usage" not in chunk for chunk in chunks)


def read_events(http: httpx.Client, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    """The chunks of a stream, without the ``[DONE]`` behind them."""
    answer = http.post(path, json=body)
    assert answer.status_code == 200, answer.text
    lines = [line.removeprefix("data: ") for line in answer.text.splitlines() if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def test_the_client_sees_which_field(live: Live) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        live.openai().chat.completions.create(
            model=NAME, messages=TURNS, modalities=["audio"]  # type: ignore[arg-type]
        )  # fmt: skip
    assert (refused.value.param, refused.value.code) == ("modalities", "unsupported_parameter")
