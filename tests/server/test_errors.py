"""Whatever a client sends, the answer is an OpenAI-shaped 4xx and never a 5xx."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from mor.server.schema.requests import ChatRequest, CompletionRequest
from tests.server.live import NAME, Live, serving


@pytest.fixture(scope="module")
def http(live: Live) -> Iterator[httpx.Client]:
    with live.http() as client:
        yield client


def problem(answer: httpx.Response, status: int) -> dict[str, Any]:
    """The error object, with its four fields."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/json"
    body = answer.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert body["error"]["message"]
    return dict(body["error"])


def refuse(http: httpx.Client, path: str = "/v1/completions", **fields: Any) -> dict[str, Any]:
    start = {"model": NAME} | ({"prompt": "the"} if path == "/v1/completions" else {})
    body = {key: value for key, value in (start | fields).items() if value is not ...}
    headers = {"Content-Type": "application/json"}
    return problem(http.post(path, content=json.dumps(body), headers=headers), 400)


@pytest.mark.parametrize(
    ("fields", "param", "code", "told"),
    [
        ({"max_tokens": "5"}, "max_tokens", "invalid_value", "found '5'"),
        ({"max_tokens": 0}, "max_tokens", "invalid_value", "greater than or equal to 1"),
        ({"max_tokens": True}, "max_tokens", "invalid_value", "True"),
        ({"max_tokens": 1.5}, "max_tokens", "invalid_value", "1.5"),
        ({"temperature": -1}, "temperature", "invalid_value", "-1"),
        ({"temperature": "hot"}, "temperature", "invalid_value", "number"),
        ({"top_p": -0.1}, "top_p", "invalid_value", "greater than or equal to 0"),
        ({"n": 129}, "n", "invalid_value", "128"),
        ({"n": 128, "prompt": ["the", "king"]}, "n", "invalid_value", "256 completions"),
        ({"stop": "a" * 1001}, "stop", "invalid_value", "at most 1000 characters"),
        ({"stop": ["a"] * 17}, "stop", "invalid_value", "at most 16"),
        ({"logit_bias": {"a": 1}}, "logit_bias.a", "invalid_value", "pattern"),
        ({"logit_bias": {"5": 101}}, "logit_bias", "invalid_value", "100"),
        ({"logit_bias": {"5000": 1}}, "logit_bias", "invalid_value", "vocab_size"),
        ({"logprobs": 21}, "logprobs", "invalid_value", "20"),
        ({"logprobs": True}, "logprobs", "invalid_value", "True"),
        ({"seed": -(2**63) - 1}, "seed", "invalid_value", "-9223372036854775809"),
        ({"seed": 2**63}, "seed", "invalid_value", "9223372036854775808"),
        ({"logit_bias": {str(i): 1 for i in range(1025)}}, "logit_bias", "invalid_value", "1024"),
        ({"prompt": [1] * 50_000}, "prompt", "context_length_exceeded", "50000 tokens"),
        ({"prompt": [[1]] * 5000}, "prompt", "invalid_value", "1024"),
        ({f"a{i}": 1 for i in range(9999)}, "a0", "unknown_field", "a0"),
        ({"stop_token_ids": [9999]}, "stop_token_ids", "invalid_value", "9999"),
        ({"depth_cap": 4}, "depth_cap", "invalid_value", "1..3"),
        ({"depth_cap": 0}, "depth_cap", "invalid_value", "1"),
        ({"prompt": []}, "prompt", "invalid_value", "prompt"),
        ({"prompt": [[]]}, "prompt", "invalid_value", "prompt"),
        ({"prompt": 5}, "prompt", "invalid_value", "list"),
        ({"prompt": ["the", 5]}, "prompt", "invalid_value", "prompt"),
        ({"prompt": [9999]}, "prompt", "invalid_value", "vocab_size"),
        ({"prompt": None}, "prompt", "invalid_value", "prompt"),
        ({"prompt": ...}, "prompt", "missing_field", "Missing"),
        ({"model": ...}, "model", "missing_field", "Missing"),
        ({"model": 5}, "model", "invalid_value", "5"),
        ({"prompt": [1] * 500}, "prompt", "context_length_exceeded", "at most 128"),
        ({"max_tokens": 500}, "prompt", "context_length_exceeded", "at most 128"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "invalid_value",
         "needs stream=true"),
        ({"stream": True, "stream_options": {"x": 1}}, "stream_options.x", "unknown_field", "x"),
        ({"best_of": 2}, "best_of", "unsupported_parameter", "n is not"),
        ({"suffix": "end"}, "suffix", "unsupported_parameter", "leave it out"),
        ({"prompt_logprobs": 21}, "prompt_logprobs", "invalid_value", "20"),
        ({"prompt_logprobs": 1, "stream": True}, "prompt_logprobs", "invalid_value", "stream"),
        ({"prompt": [1] * 129, "max_tokens": 0, "echo": True}, "prompt", "context_length_exceeded",
         "129"),
        ({"messages": []}, "messages", "unknown_field", "messages"),
        ({"top k": 1}, "top k", "unknown_field", "top k"),
        ({"\ud800": 1}, None, None, ""),
        ({"prompt": "\ud800"}, "prompt", "invalid_value", ""),
    ],
)  # fmt: skip
def test_a_wrong_field_is_named(
    http: httpx.Client, fields: dict[str, Any], param: str | None, code: str | None, told: str
) -> None:
    found = refuse(http, **fields)
    assert found["type"] == "invalid_request_error"
    assert told in found["message"]
    if param is not None:
        assert (found["param"], found["code"]) == (param, code)


@pytest.mark.parametrize(
    ("fields", "param", "told"),
    [
        ({"messages": []}, "messages", "at least 1"),
        ({"messages": [{"role": "king", "content": "x"}]}, "messages[0].role", "king"),
        ({"messages": [{"role": "user"}]}, "messages[0].content", "Missing"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content", "5"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "messages[0].content",
            "text",
        ),
        ({"top_logprobs": 2}, "top_logprobs", "needs logprobs=true"),
        ({"max_tokens": 2, "max_completion_tokens": 3}, "max_tokens", "differ"),
        ({"tool": []}, "tool", "Unknown"),
        ({"response_format": {"type": "xml"}}, "response_format.type", "text"),
        ({"messages": [{"role": "user", "content": "x" * 999}]}, "messages", "at most 128"),
        ({"messages": [{"role": "user", "content": ""}] * 5000}, "messages", "5000 messages"),
    ],
)
def test_a_wrong_field_of_a_chat(
    http: httpx.Client, fields: dict[str, Any], param: str | None, told: str
) -> None:
    start = {"messages": [{"role": "user", "content": "who?"}]}
    found = refuse(http, "/v1/chat/completions", **start | fields)
    assert told in found["message"]
    if param is not None:
        assert found["param"] == param


@pytest.mark.parametrize(
    "content",
    [
        b"{", b"\xff\xfe", b"[" * 100_000, b'{"a":' * 100_000, b"[" * 300 + b"]" * 300,
        b'{"prompt": "\xff"}', b'{"prompt": "\xed\xa0\x80"}', b"{} {}", b"{'a': 1}", b'{"a": 1,}',
        b'{"model": "tiny", "prompt": "the", "temperature": NaN}',
        b'{"model": "tiny", "prompt": "the", "user": "\\ud800", "temperature": NaN}',
        b'{"prompt": "\\ud800", "seed": ' + b"9" * 5000 + b"}",
        b'{"prompt": "\\ud800", "user": ' + b"[" * 300 + b"]" * 300 + b"}",
        b'{"prompt": "\\ud800", "user": ' + b"[" * 100_000,
        b'{"model": "tiny", "prompt": "the", "seed": ' + b"9" * 5000 + b"}",
        '{"model": "tiny"'.encode("utf-16"), b'{"user": [' + b"{}," * 70_000 + b"{}]}",
        b"[" * 70_000 + b'"' + b'\\"' * 70_000,
    ],
    ids=lambda content: ascii(content[:60]),
)  # fmt: skip
def test_a_body_that_is_no_json(http: httpx.Client, content: bytes) -> None:
    for headers in ({"Content-Type": "application/json"}, {}):
        answer = http.post("/v1/completions", content=content, headers=headers)
        assert problem(answer, 400)["code"] == "invalid_json"


@pytest.mark.parametrize(
    "content",
    [
        b"", b"[]", b"5", b'"text"', b"null", b"[" * 150 + b"]" * 150,
        b'{"model": "tiny", "prompt": "the", "temperature": 1e999}',
        b'{"model": "tiny", "prompt": "the", "seed": ' + b"9" * 4000 + b"}",
    ],
    ids=lambda content: ascii(content[:60]),
)  # fmt: skip
def test_a_body_that_is_json_and_no_request(http: httpx.Client, content: bytes) -> None:
    headers = {"Content-Type": "application/json"}
    answer = http.post("/v1/completions", content=content, headers=headers)
    assert problem(answer, 400)["code"] in ("invalid_body", "invalid_value")


def test_a_body_that_does_not_say_that_it_is_json(http: httpx.Client) -> None:
    body = json.dumps({"model": NAME, "prompt": "the"})
    for kind in ("text/plain", "application/x-www-form-urlencoded", "application/jsonx"):
        answer = http.post("/v1/completions", content=body, headers={"Content-Type": kind})
        told = problem(answer, 400)
        assert told["code"] == "invalid_content_type"
        assert kind in told["message"]
        assert "application/json" in told["message"]
    # A page of somebody else's cannot do this unseen.
    told = problem(http.post("/v1/completions", content=body, headers={"Origin": "null"}), 400)
    assert "Content-Type is missing" in told["message"]


@pytest.mark.parametrize(
    "kind", [None, "application/json", "APPLICATION/JSON; charset=utf-8", "application/x+json"]
)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32-le"])
def test_json_is_read(http: httpx.Client, kind: str | None, encoding: str) -> None:
    body = json.dumps({"model": NAME, "prompt": "the", "max_tokens": 1}).encode(encoding)
    headers = {} if kind is None else {"Content-Type": kind}
    assert http.post("/v1/completions", content=body, headers=headers).status_code == 200


def test_of_many_mistakes_one_is_looked_at(http: httpx.Client) -> None:
    """A body of a million mistakes must not cost a million reports."""
    many = 20_000
    for fields in (
        {"prompt": [[-1]] * 900 + [[1]]}, {"prompt": [""] * 1025}, {"stop": [""] * many},
        {"stop": [1] * many}, {"bad_words": [1] * many}, {"guided_choice": [1] * many},
        {"stop_token_ids": [-1] * many}, {"logit_bias": {f"a{i}": 1 for i in range(many)}},
    ):  # fmt: skip
        with pytest.raises(ValidationError) as found:
            CompletionRequest.model_validate({"model": NAME, "prompt": "x"} | fields)
        assert found.value.error_count() <= 4, fields
    message: dict[str, Any] = {"role": "user", "content": "x"}
    for messages in (
        [{}] * many, [message | {"content": [{}] * many}],
        [message | {f"a{i}": 1 for i in range(many)}], [message | {"tool_calls": [{}] * many}],
    ):  # fmt: skip
        with pytest.raises(ValidationError) as found:
            ChatRequest.model_validate({"model": NAME, "messages": messages})
        assert found.value.error_count() <= 4


def test_paths_and_methods_that_are_not_there(http: httpx.Client) -> None:
    assert problem(http.get("/v1/nothing"), 404)["code"] == "not_found"
    answer = http.get("/v1/completions")
    assert problem(answer, 405)["code"] == "method_not_allowed"
    assert answer.headers["allow"] == "POST"
    assert problem(http.get("/v1/models/a/b"), 404)["code"] == "model_not_found"


def test_a_body_that_is_too_large() -> None:
    with serving(max_body=2000) as live, live.http() as http:
        fits = {"model": NAME, "prompt": "the", "user": "x" * 1900, "max_tokens": 1}
        assert http.post("/v1/completions", json=fits).status_code == 200
        for size in (2000, 6000, 100_000):
            answer = http.post("/v1/completions", json=fits | {"user": "x" * size})
            assert problem(answer, 413)["code"] == "body_too_large"
        # Without a length told before.
        parts = (b" " * 500 for _ in range(8))
        problem(http.post("/v1/completions", content=parts), 413)
        assert http.get("/ready").status_code == 200


def test_keys() -> None:
    with serving(api_keys=["one", "two"]) as live, live.http() as http:
        wrong = ("", "Bearer three", "one", "Bearer", "Basic one", "Bearer onetwo", "Bearer \xf6")
        for value in wrong:
            headers = {"Authorization": value.encode("latin-1")} if value else {}
            answer = http.get("/v1/models", headers=headers)
            assert problem(answer, 401)["type"] == "authentication_error"
            assert answer.headers["www-authenticate"] == "Bearer"
        for key in ("one", "two"):
            listed = http.get("/v1/models", headers={"Authorization": f"Bearer {key}"})
            assert listed.status_code == 200
        for path in ("/health", "/ready", "/metrics", "/"):
            assert http.get(path).status_code == 200


def test_no_chat_template() -> None:
    with serving(chat_template=None) as live, live.http() as http:
        body = {"model": NAME, "messages": [{"role": "user", "content": "who?"}]}
        found = problem(http.post("/v1/chat/completions", json=body), 400)
        assert found["code"] == "no_chat_template"


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)
_FIELDS = st.sampled_from(
    ["prompt", "max_tokens", "temperature", "stop", "logit_bias", "n", "stream", "seed", "echo",
     "logprobs", "top_k", "stop_token_ids", "depth_cap", "stream_options", "best_of", "user"]
)  # fmt: skip


@given(st.dictionaries(_FIELDS, _JSON, min_size=1, max_size=3))
def test_any_json_in_any_field(live: Live, fields: dict[str, Any]) -> None:
    content = json.dumps({"model": NAME, "prompt": "the", "max_tokens": 2} | fields)
    with live.http(headers={"Content-Type": "application/json"}) as client:
        answer = client.post("/v1/completions", content=content)
    if answer.status_code != 200:
        problem(answer, 400)
