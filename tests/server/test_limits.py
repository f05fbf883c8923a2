"""What is refused costs little, and keeps nobody waiting who is not."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from mor.engine.fitting import PIECE
from mor.errors import MorError
from mor.server import create_app
from mor.server.state import State
from tests.server.live import NAME, Live, make_engine, serving
from tests.server.test_errors import problem

HUGE = "the king " * 300_000
TURNS = [{"role": "user", "content": "x"}]
PART = {"type": "text", "text": ""}
CALL = {"function": {"name": "f", "arguments": "{}"}}


class Watched:
    """The server's tokenizer: it counts characters, and stops at a gate."""

    def __init__(self, inner: Any) -> None:
        self.inner, self.characters, self.gate = inner, 0, threading.Event()
        self.gate.set()

    def __call__(self, text: str, **options: Any) -> Any:
        self.characters += len(text)
        assert self.gate.wait(60)
        return self.inner(text, **options)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)


@pytest.fixture(scope="module")
def watched() -> Iterator[tuple[Live, Watched]]:
    with serving(max_waiting=2) as live:
        app: Any = live.server.config.app
        state = app.state.mor
        assert isinstance(state, State)
        state.tokens.tokenizer = Watched(state.tokens.tokenizer)
        yield live, state.tokens.tokenizer


def ask(http: httpx.Client, **fields: Any) -> httpx.Response:
    path = "/v1/chat/completions" if "messages" in fields else "/v1/completions"
    return http.post(path, json={"model": NAME, "max_tokens": 1} | fields)


@pytest.mark.parametrize(
    ("fields", "code", "pieces"),
    [
        ({"prompt": HUGE}, "context_length_exceeded", 1),
        ({"prompt": [HUGE, "the"]}, "context_length_exceeded", 1),
        ({"prompt": [HUGE] + ["the"] * 20}, "invalid_value", 0),  # too many completions
        ({"prompt": HUGE, "n": 50}, "invalid_value", 0),
        ({"prompt": HUGE, "depth": 1}, "unknown_field", 0),
        ({"messages": [{"role": "user", "content": HUGE}]}, "context_length_exceeded", 1),
        (
            {"messages": [{"role": "user", "content": HUGE[:9000]}] * 100},
            "context_length_exceeded", 1,
        ),
        ({"messages": [{"role": "user", "content": "x"}] * 20_000}, "context_length_exceeded", 0),
        ({"prompt": [5] * 1_000_000}, "context_length_exceeded", 0),
        ({"prompt": [[5] * 500_000, [5]]}, "context_length_exceeded", 0),
        ({"messages": [{"role": "user", "content": [PART] * 200}] * 100}, "invalid_value", 0),
        (
            {"messages": [{"role": "assistant", "tool_calls": [CALL] * 200}] * 100},
            "invalid_value", 0,
        ),
        ({"messages": TURNS, "chat_template_kwargs": dict.fromkeys(map(str, range(999)))},
         "invalid_value", 0),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_hardly_read(
    watched: tuple[Live, Watched], fields: dict[str, Any], code: str, pieces: int
) -> None:
    live, tokenizer = watched
    tokenizer.characters = 0
    with live.http() as http:
        assert problem(ask(http, **fields), 400)["code"] == code
    assert tokenizer.characters <= pieces * PIECE
    live.wait_idle()


def test_brackets_in_a_text_are_no_arrays(watched: tuple[Live, Watched]) -> None:
    with watched[0].http() as http:
        assert ask(http, prompt="x", user='[{"' * 50_000 + "\\").status_code == 200


def test_token_ids_do_not_wait_for_texts(watched: tuple[Live, Watched]) -> None:
    live, tokenizer = watched
    tokenizer.gate.clear()
    with ThreadPoolExecutor() as pool, live.http() as http:
        try:
            texts = [pool.submit(ask, http, prompt=prompt) for prompt in (HUGE, "the king")]
            assert ask(http, prompt=[5, 6]).status_code == 200
        finally:
            tokenizer.gate.set()
        assert sorted(one.result().status_code for one in texts) == [200, 400]


def test_what_finds_no_place_is_not_read(watched: tuple[Live, Watched]) -> None:
    live, tokenizer = watched
    taken = live.loop.reserve(live.loop.most, 1)
    tokenizer.characters = 0
    try:
        with live.http() as http:
            assert problem(ask(http, prompt="the king"), 429)["code"] == "overloaded"
            chat = [{"role": "user", "content": "who?"}]
            assert problem(ask(http, messages=chat), 429)["code"] == "overloaded"
    finally:
        live.loop.release(taken)
    assert tokenizer.characters == 0


def test_a_pool_that_holds_less_than_the_model() -> None:
    """What the card says is what fits, to the token."""
    engine = make_engine(num_pages=60, page_size=4)
    assert engine.max_model_len < 128
    with serving(engine) as live, live.http() as http:
        most = http.get("/v1/models").json()["data"][0]["max_model_len"]
        assert most == engine.max_model_len
        full = ask(http, prompt=[5] * (most - 1), ignore_eos=True)
        assert full.json()["usage"]["total_tokens"] == most
        assert problem(ask(http, prompt=[5] * most), 400)["code"] == "context_length_exceeded"
        told = problem(ask(http, prompt=[5, 6], max_tokens=most - 1), 400)
        assert told["code"] == "context_length_exceeded"
        # Without max_tokens each prompt gets 16, or what fits.
        prompts = [[5], [5] * (most - 3)]
        both = ask(http, prompt=prompts, max_tokens=None, ignore_eos=True).json()["choices"]
        assert [len(choice["depths"]) for choice in both] == [16, 3]
        for depth_cap in (1, None):
            chat = [{"role": "user", "content": "who?"}]
            answer = ask(http, messages=chat, max_tokens=None, ignore_eos=True, depth_cap=depth_cap)
            assert answer.json()["usage"]["total_tokens"] == most
        live.wait_idle()


@pytest.mark.parametrize("num_pages", [1, 3, 30])
def test_a_pool_that_holds_no_ordinary_request(num_pages: int) -> None:
    with pytest.raises(MorError, match=f"num_pages={num_pages} .* holds no request of "):
        create_app(make_engine(num_pages=num_pages, page_size=4), NAME)
