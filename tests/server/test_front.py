"""The front over replicas that refuse, die and come back: no answer is cut silently."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx
import pytest
from starlette.types import Message

from mor.server import create_app
from mor.server.middleware import Guard
from mor.server.ray.backend import NoReplica, TooMany
from mor.server.ray.front import Front
from mor.server.ray.totals import Totals
from tests.server.fakes import Fakes, ask, events
from tests.server.live import NAME, TEMPLATE, make_engine

ASK: dict[str, Any] = {
    "model": NAME, "prompt": "the", "max_tokens": 6, "temperature": 0, "ignore_eos": True,
    "return_token_ids": True,
}  # fmt: skip


@pytest.fixture(scope="module")
def apps() -> Any:
    """Two engines, alive for all tests, in an event loop of the module's own."""
    made = {name: create_app(make_engine(), NAME, chat_template=TEMPLATE) for name in ("a", "b")}
    with asyncio.Runner() as runner:

        async def begin() -> list[Any]:
            lives = [app.router.lifespan_context(app) for app in made.values()]
            for life in lives:
                await life.__aenter__()
            return lives

        async def end(lives: list[Any]) -> None:
            for life in lives:
                await life.__aexit__(None, None, None)

        lives = runner.run(begin())
        yield made, runner
        runner.run(end(lives))


@pytest.fixture(scope="module")
def right(apps: Any) -> list[int]:
    ids: list[int] = ask(apps, Fakes({}), **ASK).json()["choices"][0]["token_ids"]
    assert len(ids) == 6
    return ids


def tokens(answer: httpx.Response) -> list[int]:
    told = [event for event in events(answer) if event != "[DONE]" and "error" not in event]
    return [token for event in told for token in event["choices"][0]["token_ids"]]


@pytest.mark.parametrize("after", [0, 1])
@pytest.mark.parametrize("stream", [False, True])
def test_a_replica_that_dies_before_its_first_token_is_replaced(
    apps: Any, right: list[int], after: int, stream: bool
) -> None:
    fakes = Fakes({}, dies={"a": after})
    answer = ask(apps, fakes, **ASK, stream=stream)
    assert (answer.status_code, fakes.calls) == (200, ["a", "b"])
    told = tokens(answer) if stream else answer.json()["choices"][0]["token_ids"]
    assert told == right


def test_the_opening_of_a_chat_is_taken_back(apps: Any) -> None:
    chat = {"model": NAME, "messages": [{"role": "user", "content": "the"}], "max_tokens": 3}
    fakes = Fakes({}, dies={"a": 2})  # start, and the chunk that says who speaks
    told = events(ask(apps, fakes, "/v1/chat/completions", **chat, stream=True))
    assert fakes.calls == ["a", "b"]
    assert len({event["id"] for event in told[:-1]}) == 1
    assert [e["choices"][0]["delta"].get("role") for e in told[:-1]].count("assistant") == 1


@pytest.mark.parametrize("after", [2, 3, 5])
def test_a_stream_that_is_cut_ends_with_an_error(apps: Any, right: list[int], after: int) -> None:
    fakes = Fakes({}, dies={"a": after})
    answer = ask(apps, fakes, **ASK, stream=True)
    *_, error, done = events(answer)
    assert (done, error["error"]["code"], fakes.calls) == ("[DONE]", "replica_lost", ["a"])
    assert error["error"]["type"] == "service_unavailable_error"
    assert tokens(answer) == right[: after - 1]
    assert not any(e["choices"][0]["finish_reason"] for e in events(answer)[:-2])


@pytest.mark.parametrize("stream", [False, True])
def test_where_every_replica_dies_the_client_is_told_to_try_again(apps: Any, stream: bool) -> None:
    fakes = Fakes({}, dies={"a": 1, "b": 1})
    answer = ask(apps, fakes, **ASK, stream=stream)
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "replica_lost")
    assert answer.headers["retry-after"]


@pytest.mark.parametrize("status", [429, 503])
def test_a_refusal_is_tried_elsewhere_and_told_where_all_refuse(apps: Any, status: int) -> None:
    fakes = Fakes({}, refuses={"a": status})
    assert ask(apps, fakes, **ASK).status_code == 200
    assert fakes.calls == ["a", "b"]
    fakes = Fakes({}, refuses={"a": status, "b": status})
    answer = ask(apps, fakes, **ASK, stream=True)
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, "overloaded")


def test_no_replica_and_too_many_requests(apps: Any) -> None:
    for wrong, status, code in [
        (NoReplica(), 503, "no_replica"),
        (TooMany(), 429, "overloaded"),
        (None, 503, "no_replica"),
    ]:
        answer = ask(apps, Fakes({}, wrong=wrong, hangs=wrong is None), **ASK)
        assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)
        assert int(answer.headers["retry-after"]) >= 1


def test_what_the_application_refuses_is_passed_on(apps: Any) -> None:
    fakes = Fakes({})
    answer = ask(apps, fakes, **{**ASK, "max_tokens": -1})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "max_tokens")
    assert ask(apps, Fakes({}), "/nowhere").status_code == 404
    assert ask(apps, Fakes({}), "/").headers["content-type"].startswith("text/html")
    assert ask(apps, Fakes({}), "/v1/models").json()["data"][0]["id"] == NAME
    assert ask(apps, Fakes({}), "/ready").status_code == 200
    assert fakes.calls == ["a"]


def test_a_client_that_leaves_gives_its_request_up(apps: Any) -> None:
    made, runner = apps
    fakes = Fakes(made)
    front = Front(fakes, Totals(NAME))
    body = json.dumps({**ASK, "max_tokens": 110, "stream": True}).encode()
    heard: list[Message] = []
    inbox = [{"type": "http.request", "body": body, "more_body": False}]
    scope = {
        "type": "http", "method": "POST", "path": "/v1/completions", "headers": [
            (b"content-type", b"application/json")], "query_string": b"",
    }  # fmt: skip

    async def go() -> None:
        leaves = asyncio.Event()

        async def receive() -> Message:
            if inbox:
                return inbox.pop()
            await leaves.wait()
            return {"type": "http.disconnect"}

        async def send(message: Message) -> None:
            heard.append(message)
            if len(heard) == 4:
                leaves.set()

        await front(scope, receive, send)
        loop = made["a"].state.mor.loop
        while loop.under_way:
            await asyncio.sleep(0.005)

    runner.run(go())
    assert 4 <= len(heard) < 60
    assert (fakes.closed, front.under_way) == (1, 0)


def test_a_front_that_drains_takes_no_more(apps: Any) -> None:
    made, runner = apps
    front = Front(Fakes(made), Totals(NAME))
    runner.run(front.drain(0.0))

    async def go() -> list[int]:
        transport = httpx.ASGITransport(app=front)
        async with httpx.AsyncClient(transport=transport, base_url="http://front") as client:
            asked = await client.post("/v1/completions", json=ASK)
            return [asked.status_code, (await client.get("/ready")).status_code]

    assert runner.run(go()) == [503, 503]


# Metrics ------------------------------------------------------------------------------------------


def values(text: bytes) -> dict[str, float]:
    lines = [line for line in text.decode().splitlines() if not line.startswith("#")]
    return {line.rsplit(" ", 1)[0]: float(line.rsplit(" ", 1)[1]) for line in lines}


def test_metrics_are_summed_and_told_one_by_one_and_never_fall(apps: Any) -> None:
    made, runner = apps
    totals, fakes = Totals(NAME), Fakes(made)
    name = f'{{model_name="{NAME}"}}'

    async def go() -> list[dict[str, Any]]:
        async def alive(*names: str) -> dict[str, float]:
            told = [one for one in await fakes.tell() if one["name"] in names]
            return values(totals.text(told))

        return [await alive("a", "b"), await alive("b"), await alive("a", "b")]

    both, one, again = runner.run(go())
    each = [f'mor:replica_prompt_tokens_total{{model_name="{NAME}",replica="{r}"}}' for r in "ab"]
    prompt = f"mor:prompt_tokens_total{name}"
    assert both[prompt] == both[each[0]] + both[each[1]] > 0
    assert both[each[0]] > 0
    assert one[prompt] == again[prompt] == both[prompt]
    assert each[0] not in one
    assert (both[f"mor:replicas{name}"], one[f"mor:replicas{name}"]) == (2, 1)
    count = f"mor:e2e_request_latency_seconds_count{name}"
    assert one[count] == both[count] > 0
    usage = f"mor:mean_depth{name}"
    each_usage = [
        both[f'mor:replica_mean_depth{{model_name="{NAME}",replica="{r}"}}'] for r in "ab"
    ]
    assert both[usage] == pytest.approx(sum(each_usage) / 2)


def test_the_fronts_guard_asks_for_a_key_and_counts_answers(apps: Any) -> None:
    made, runner = apps
    totals, fakes = Totals(NAME), Fakes(made)
    guarded = Guard(Front(fakes, totals), ["secret"], 1000, totals)

    async def go() -> list[int]:
        transport = httpx.ASGITransport(app=guarded)
        async with httpx.AsyncClient(transport=transport, base_url="http://front") as client:
            bare = await client.post("/v1/completions", json=ASK)
            key = {"Authorization": "Bearer secret"}
            right = await client.post("/v1/completions", json=ASK, headers=key)
            large = await client.post("/v1/completions", content=b"x" * 1001, headers=key)
            metrics = await client.get("/metrics")
            assert 'mor:http_responses_total{model_name="tiny",status="401"} 1.0' in metrics.text
            return [bare.status_code, right.status_code, large.status_code, metrics.status_code]

    assert runner.run(go()) == [401, 200, 413, 200]
    assert fakes.calls == ["a"]
