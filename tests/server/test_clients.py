"""What ordinary clients expect beside the two calls: CORS, HEAD, tokens, fields of vLLM."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

import mor
from mor.errors import MorError
from mor.server.crossing import check_origins
from tests.server.live import NAME, Live, serving, tokenizer
from tests.server.test_errors import problem

CHAT = "/v1/chat/completions"
JSON = {"Content-Type": "application/json"}
CHATTED = "user: who?\nassistant: a king\n"
PAGE = "http://localhost:3000"


@pytest.fixture(scope="module")
def http(live: Live) -> Iterator[httpx.Client]:
    with live.http() as client:
        yield client


def complete(http: httpx.Client, **fields: Any) -> dict[str, Any]:
    body = {"model": NAME, "prompt": "the king", "temperature": 0, "max_tokens": 12} | fields
    answer = http.post("/v1/completions", json=body | {"return_token_ids": True})
    assert answer.status_code == 200, answer.text
    return dict(answer.json()["choices"][0])


def test_pages_of_named_origins_may_ask() -> None:
    with serving(cors_origins=[PAGE], api_keys=["one"]) as live, live.http() as http:
        ask = {
            "Access-Control-Request-Method": "POST",
            "Access-Control-Request-Headers": "authorization,x-stainless-os,content-type",
        }
        allowed = http.options(
            CHAT, headers=ask | {"Origin": PAGE}
        )  # without a key, as browsers do
        assert allowed.status_code == 200
        assert allowed.headers["access-control-allow-origin"] == PAGE
        assert "x-stainless-os" in allowed.headers["access-control-allow-headers"]
        other = http.options(CHAT, headers=ask | {"Origin": "http://evil.example"})
        assert "access-control-allow-origin" not in other.headers
        refused = http.post(CHAT, headers={"Origin": PAGE}, json={})
        assert refused.status_code == 401
        assert refused.headers["access-control-allow-origin"] == PAGE
        key = {"Authorization": "Bearer one", "Origin": PAGE}
        listed = http.get("/v1/models", headers=key)
        assert listed.headers["access-control-allow-origin"] == PAGE


def test_all_origins_or_none(http: httpx.Client) -> None:
    assert (
        "access-control-allow-origin" not in http.get("/health", headers={"Origin": PAGE}).headers
    )
    with serving(cors_origins=["*"]) as live, live.http() as open_to_all:
        answer = open_to_all.get("/health", headers={"Origin": PAGE})
        assert answer.headers["access-control-allow-origin"] == "*"


@pytest.mark.parametrize(
    "origin",
    ["localhost:3000", "http://localhost:3000/", "http://a/b", "", "http://", "http://u@a",
     "http://a:x", "HTTP://a", "http://a?b"],
)  # fmt: skip
def test_an_origin_that_no_browser_sends(origin: str) -> None:
    with pytest.raises(MorError, match="cors_origin="):
        check_origins([origin])


def test_origins() -> None:
    check_origins(
        ["*", "http://a", "https://a.example:8443", "chrome-extension://abc", "http://[::1]:80"]
    )


@pytest.mark.parametrize("path", ["/health", "/ready", "/version", "/v1/models", "/metrics", "/"])
def test_head_where_there_is_get(http: httpx.Client, path: str) -> None:
    asked, told = http.head(path), http.get(path)
    assert (asked.status_code, asked.content) == (told.status_code, b"") == (200, b"")
    assert asked.headers["content-type"] == told.headers["content-type"]
    assert http.head("/v1/completions").status_code == 405
    assert http.head("/nothing").status_code == 404


def test_version(http: httpx.Client) -> None:
    assert http.get("/version").json() == {"version": mor.__version__}


def test_tokenize_and_back(http: httpx.Client, live: Live) -> None:
    text = "naïve – 東京 🙂"
    told = http.post("/tokenize", json={"model": NAME, "prompt": text}).json()
    ids = tokenizer()(text).input_ids
    assert told == {
        "count": len(ids), "max_model_len": live.engine.max_model_len, "tokens": ids,
        "token_strs": None,
    }  # fmt: skip
    assert http.post("/detokenize", json={"tokens": ids}).json() == {"prompt": text}
    named = http.post("/tokenize", json={"prompt": "the king", "return_token_strs": True}).json()
    assert "".join(named["token_strs"]) == "the king"
    bare = http.post("/tokenize", json={"prompt": "<|endoftext|>a", "add_special_tokens": False})
    ids = bare.json()["tokens"]
    assert ids[0] == 0
    assert http.post("/detokenize", json={"tokens": ids}).json()["prompt"] == "<|endoftext|>a"
    for empty in ({"prompt": ""}, {"prompt": "", "add_special_tokens": False}):
        assert http.post("/tokenize", json=empty).json()["count"] == 0
    assert http.post("/detokenize", json={"tokens": []}).json() == {"prompt": ""}


def test_tokenize_a_chat(http: httpx.Client) -> None:
    messages = [{"role": "user", "content": "who?"}, {"role": "assistant", "content": "a king"}]

    def text(**fields: Any) -> str:
        ids = http.post("/tokenize", json={"messages": messages} | fields).json()["tokens"]
        return str(http.post("/detokenize", json={"tokens": ids}).json()["prompt"])

    assert text() == CHATTED + "assistant: "
    assert text(add_generation_prompt=False) == CHATTED
    assert text(continue_final_message=True) == CHATTED.rstrip()


@pytest.mark.parametrize(
    ("path", "body", "param", "code"),
    [
        ("/tokenize", {}, "prompt", "missing_field"),
        ("/tokenize", {"prompt": 5}, "prompt", "invalid_value"),
        ("/tokenize", {"prompt": "a", "promt": "b"}, "promt", "unknown_field"),
        ("/tokenize", {"messages": []}, "messages", "invalid_value"),
        ("/tokenize", {"messages": [{"role": "user"}]}, "messages[0].content", "missing_field"),
        ("/detokenize", {}, "tokens", "missing_field"),
        ("/detokenize", {"tokens": [9999]}, "tokens", "invalid_value"),
        ("/detokenize", {"tokens": [-1]}, "tokens[0]", "invalid_value"),
        ("/detokenize", {"tokens": "abc"}, "tokens", "invalid_value"),
    ],
)
def test_tokenize_refuses(
    http: httpx.Client, path: str, body: dict[str, Any], param: str, code: str
) -> None:
    found = problem(http.post(path, json=body), 400)
    assert (found["param"], found["code"]) == (param, code)


def test_an_unknown_model_has_no_tokens(http: httpx.Client) -> None:
    for path, body in (("/tokenize", {"prompt": "a"}), ("/detokenize", {"tokens": [1]})):
        assert problem(http.post(path, json=body | {"model": "gpt-4"}), 404)


def test_no_end_before_min_tokens(http: httpx.Client) -> None:
    free = complete(http, max_tokens=20)
    stop = free["token_ids"][3]
    ended = complete(http, stop_token_ids=[stop])
    later = complete(http, stop_token_ids=[stop], min_tokens=10)
    assert len(ended["token_ids"]) <= 4
    assert len(later["token_ids"]) >= 10
    assert stop not in later["token_ids"][:9]
    text = free["text"][2:4]
    early = complete(http, stop=text)
    assert (early["text"], early["finish_reason"]) == (
        free["text"][: free["text"].find(text)],
        "stop",
    )
    late = complete(http, stop=text, min_tokens=12)
    assert (late["token_ids"], late["finish_reason"]) == (free["token_ids"][:12], "length")
    body = {"model": NAME, "prompt": "the", "max_tokens": 3, "min_tokens": 4}
    assert problem(http.post("/v1/completions", json=body), 400)["param"] == "min_tokens"


def test_a_stop_is_shown_where_asked_for(http: httpx.Client) -> None:
    free = complete(http, max_tokens=20)
    text = free["text"][4:6]
    place = free["text"].find(text)
    shown = complete(http, stop=text, include_stop_str_in_output=True, max_tokens=20)
    assert shown["text"] == free["text"][: place + 2]
    assert shown["stop_reason"] == text
    chars = [t for t in free["token_ids"] if tokenizer().decode([t]).isalpha()]
    ends = {"stop_token_ids": chars[:1], "max_tokens": 20}
    without = complete(http, **ends)
    with_it = complete(http, **ends, include_stop_str_in_output=True)
    assert without["finish_reason"] == "stop"
    assert with_it["token_ids"] == without["token_ids"]
    assert with_it["text"] == without["text"] + tokenizer().decode([chars[0]])


def test_special_tokens_are_shown_where_asked_for(http: httpx.Client) -> None:
    forced = {"logit_bias": {"1": 100}, "max_tokens": 2}
    assert complete(http, **forced)["text"] == ""
    assert complete(http, **forced, skip_special_tokens=False)["text"] == "<|pad|><|pad|>"
    ended = complete(http, logit_bias={"0": 100}, skip_special_tokens=False)
    assert (ended["text"], ended["finish_reason"]) == ("", "stop")
    ended = complete(
        http, logit_bias={"0": 100}, skip_special_tokens=False, include_stop_str_in_output=True
    )
    assert ended["text"] == "<|endoftext|>"


def test_bad_words_are_not_written(http: httpx.Client) -> None:
    free = complete(http, max_tokens=20)["text"]
    word = next(free[i : i + 3] for i in range(len(free) - 3) if free[i : i + 3].isascii())
    for bad in ([word], [word[:1]], [word, free[0]]):
        text = complete(http, bad_words=bad, max_tokens=20)["text"]
        assert all(one not in text for one in bad)
    body = {"model": NAME, "prompt": "the", "bad_words": [""]}
    assert problem(http.post("/v1/completions", json=body), 400)["param"] == "bad_words[0]"


def test_the_template_gets_further_variables(caller: Live) -> None:
    with caller.http() as http:
        body = {
            "messages": [{"role": "user", "content": "x"}],
            "chat_template_kwargs": {"mood": "glad"},
        }
        ids = http.post("/tokenize", json=body).json()["tokens"]
        assert (
            http.post("/detokenize", json={"tokens": ids}).json()["prompt"]
            == "user: xglad assistant: "
        )
        said = {"model": NAME, "max_tokens": 2, "temperature": 0}
        usage = http.post(CHAT, json=body | said).json()["usage"]
        assert usage["prompt_tokens"] == len(ids)
        body["chat_template_kwargs"] = {"mood": "\ud800"}
        wrong = http.post("/tokenize", content=json.dumps(body), headers=JSON)
        assert problem(wrong, 400)["param"] == "messages"
