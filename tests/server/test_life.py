"""Clients that leave, overload, failure, shutdown, metrics: nothing hangs and no page is lost."""

from __future__ import annotations

import asyncio
import json
import re
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import pytest

from tests.server.live import NAME, Live, make_engine, serving
from tests.server.slow import LONG, SlowEngine, slow_engine, wait_for


@pytest.fixture
def slow() -> Any:
    with serving(slow_engine(), max_waiting=2, drain_seconds=0.0) as live:
        yield live


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_pages(slow: Live, stream: bool) -> None:
    before = slow.engine.stats.ticks
    body = LONG | {"n": 2}
    with slow.http() as client:
        if stream:
            with client.stream("POST", "/v1/completions", json=body | {"stream": True}) as answer:
                assert answer.status_code == 200
                lines = (line for line in answer.iter_lines() if line)
                assert all(next(lines).startswith("data: ") for _ in range(5))
        else:
            with pytest.raises(httpx.ReadTimeout):
                client.post("/v1/completions", json=body, timeout=httpx.Timeout(60.0, read=0.15))
    slow.wait_idle(10.0)
    assert slow.engine.stats.ticks - before < 100  # 240 tokens would have taken more
    assert slow.metric("mor:request_aborted_total") == 2


def test_a_client_that_leaves_while_it_waits(slow: Live) -> None:
    with ThreadPoolExecutor() as pool, slow.http() as client:
        first = pool.submit(client.post, "/v1/completions", json=LONG | {"n": 4, "max_tokens": 25})
        wait_for(lambda: slow.loop.under_way == 4)
        timeout = httpx.Timeout(60.0, read=0.05)
        with pytest.raises(httpx.ReadTimeout):
            client.post("/v1/completions", json=LONG | {"n": 2}, timeout=timeout)
        wait_for(lambda: slow.loop.under_way == 4)
        assert len(first.result().json()["choices"]) == 4
    slow.wait_idle()


def test_half_a_request(slow: Live) -> None:
    """A client that goes in the middle of its own body."""
    host, port = slow.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as raw:
        raw.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            b'Content-Length: 1000\r\n\r\n{"model": '
        )
    with slow.http() as client:
        assert client.get("/ready").status_code == 200
    slow.wait_idle()


@pytest.mark.slow
def test_overload_is_told_and_passes(slow: Live) -> None:
    body = LONG | {"max_tokens": 40}
    with ThreadPoolExecutor(8) as pool, slow.http() as client:
        running = [pool.submit(client.post, "/v1/completions", json=body) for _ in range(6)]
        wait_for(lambda: slow.loop.under_way == 6)
        answer = client.post("/v1/completions", json=body)
        assert answer.status_code == 429
        assert int(answer.headers["retry-after"]) >= 1
        assert answer.json()["error"]["type"] == "rate_limit_error"
        assert slow.metric("mor:request_rejected_total") == 1
        texts = {done.result().json()["choices"][0]["text"] for done in running}
        assert len(texts) == 1
        assert client.post("/v1/completions", json=body).status_code == 200
    slow.wait_idle()


@pytest.mark.slow
def test_the_openai_client_tries_again_after_429(slow: Live) -> None:
    with ThreadPoolExecutor(8) as pool, slow.http() as client:
        body = LONG | {"max_tokens": 30}
        running = [pool.submit(client.post, "/v1/completions", json=body) for _ in range(6)]
        wait_for(lambda: slow.loop.under_way == 6)
        retrying = slow.openai(max_retries=5)
        answer = retrying.completions.create(model=NAME, prompt="the", max_tokens=2)
        assert answer.choices[0].finish_reason
        assert slow.metric("mor:request_rejected_total") >= 1
        for done in running:
            assert done.result().status_code == 200


def test_the_event_loop_does_not_wait_for_a_tick(slow: Live) -> None:
    assert isinstance(slow.engine, SlowEngine)
    slow.engine.pause = 0.5
    with ThreadPoolExecutor() as pool, slow.http() as client:
        running = pool.submit(client.post, "/v1/completions", json=LONG | {"max_tokens": 1})
        wait_for(lambda: slow.loop.under_way == 1)
        began = time.monotonic()
        for _ in range(5):
            assert client.get("/ready").status_code == 200
        assert time.monotonic() - began < 0.4
        slow.engine.pause = 0.0
        assert running.result().status_code == 200


@pytest.mark.parametrize("stream", [True, False])
def test_a_tick_that_fails(stream: bool) -> None:
    engine = slow_engine()
    options: dict[str, Any] = {"drain_seconds": 0.0, "max_restarts": 0}
    with serving(engine, **options) as live, live.http() as client:
        with ThreadPoolExecutor() as pool:
            body = LONG | {"stream": stream}
            running = [pool.submit(client.post, "/v1/completions", json=body) for _ in range(3)]
            wait_for(lambda: engine.stats.sampled > 6)
            engine.broken = RuntimeError("the device is gone")
            answers = [done.result() for done in running]
        for answer in answers:
            if stream:
                *_, last, end = re.findall(r"data: (.*)\n\n", answer.text)
                assert end == "[DONE]"
                told = json.loads(last)["error"]
            else:
                assert answer.status_code == 500
                told = answer.json()["error"]
            assert told["code"] == "engine_failed"
            assert "the device is gone" in told["message"]
        for path in ("/ready", "/health"):
            assert client.get(path).status_code == 503
        refused = client.post("/v1/completions", json=LONG)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "engine_failed")
        assert client.get("/metrics").status_code == 200
        live.wait_idle()


def test_the_client_raises_when_a_stream_fails() -> None:
    engine = slow_engine()
    with serving(engine, drain_seconds=0.0) as live:
        stream = live.openai().completions.create(
            model=NAME, prompt="the", max_tokens=50, stream=True, extra_body={"ignore_eos": True}
        )
        next(iter(stream))
        engine.broken = RuntimeError("the device is gone")
        with pytest.raises(openai.APIError, match="the device is gone"):
            list(stream)


def begin_drain(live: Live) -> None:
    assert live.loop.asyncio_loop is not None
    live.loop.asyncio_loop.call_soon_threadsafe(live.server.begin_drain)


@pytest.mark.slow
def test_a_shutdown_lets_requests_finish() -> None:
    with serving(slow_engine(), drain_seconds=120.0) as live, live.http() as client:
        with ThreadPoolExecutor() as pool:
            running = pool.submit(client.post, "/v1/completions", json=LONG | {"max_tokens": 40})
            wait_for(lambda: live.engine.stats.sampled > 3)
            begin_drain(live)
            wait_for(lambda: client.get("/ready").status_code == 503)
            refused = client.post("/v1/completions", json=LONG)
            assert (refused.status_code, refused.json()["error"]["code"]) == (503, "shutting_down")
            assert refused.headers["retry-after"]
            assert client.get("/health").status_code == 200
            answer = running.result()
        assert answer.json()["usage"]["completion_tokens"] == 40
        wait_for(lambda: live.server.should_exit)


def test_a_shutdown_has_an_end() -> None:
    with serving(slow_engine(), drain_seconds=0.2) as live, live.http() as client:
        with ThreadPoolExecutor() as pool:
            whole = pool.submit(client.post, "/v1/completions", json=LONG)
            stream = pool.submit(client.post, "/v1/completions", json=LONG | {"stream": True})
            wait_for(lambda: live.engine.stats.sampled > 3)
            began = time.monotonic()
            begin_drain(live)
            assert whole.result().status_code == 503
            assert '"code":"shutting_down"' in stream.result().text
            assert time.monotonic() - began < 5
        wait_for(lambda: live.server.should_exit)
        assert live.engine.store.pool.used == 0


@pytest.mark.slow
def test_many_threads_at_once(live: Live) -> None:
    """Answers do not mix."""
    wanted = {}
    for length in range(1, 13):
        fields = LONG | {"prompt": [length + 60] * length, "max_tokens": length}
        with live.http() as client:
            wanted[length] = client.post("/v1/completions", json=fields).json()["choices"]
    problems = []

    def work(length: int) -> None:
        fields = LONG | {"prompt": [length + 60] * length, "max_tokens": length}
        with live.http() as client:
            if client.post("/v1/completions", json=fields).json()["choices"] != wanted[length]:
                problems.append(length)

    threads = [threading.Thread(target=work, args=(1 + i % 12,)) for i in range(24)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not problems
    live.wait_idle()


def test_metrics() -> None:
    with serving(make_engine()) as live:
        answer = live.openai().completions.create(
            prompt=["the king", "thou"], n=2, max_tokens=7, model=NAME,
            extra_body={"ignore_eos": True},
        )  # fmt: skip
        live.wait_idle()
        depths = [depth for choice in answer.choices for depth in choice.depths]  # type: ignore
        assert live.metric("mor:generation_tokens_total") == len(depths) == 28
        assert answer.usage is not None
        assert live.metric("mor:prompt_tokens_total") == answer.usage.prompt_tokens
        assert live.metric("mor:request_success_total") == 4
        assert live.metric("mor:token_depth_sum") == sum(depths)
        assert live.metric("mor:token_depth_count") == 28
        for name, count in (
            ("request_queue_time", 4), ("time_to_first_token", 4), ("e2e_request_latency", 4),
            ("inter_token_latency", 24),
        ):  # fmt: skip
            assert live.metric(f"mor:{name}_seconds_count") == count
        assert live.metric("mor:e2e_request_latency_seconds_sum") > 0
        assert live.metric("mor:http_responses_total") > 1


def test_who_asks_and_goes_harms_nobody(slow: Live) -> None:
    assert isinstance(slow.engine, SlowEngine)
    slow.engine.pause = 0.2

    async def leave() -> None:
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(slow.loop.call(lambda engine: engine.metrics()), 0.02)

    with ThreadPoolExecutor() as pool, slow.http() as client:
        running = pool.submit(client.post, "/v1/completions", json=LONG | {"max_tokens": 2})
        wait_for(lambda: slow.engine.stats.ticks > 0)
        asyncio.run(leave())
        slow.engine.pause = 0.0
        assert running.result().status_code == 200
        assert client.get("/health").status_code == 200


def test_a_request_that_cannot_be_added() -> None:
    """It fails alone."""
    with serving() as live, live.http() as client:
        add = live.engine.add_request

        def broken(*args: Any) -> str:
            raise RuntimeError("no")

        live.engine.add_request = broken  # type: ignore[method-assign]
        answer = client.post("/v1/completions", json=LONG | {"max_tokens": 2})
        assert (answer.status_code, answer.json()["error"]["code"]) == (500, "engine_error")
        live.engine.add_request = add  # type: ignore[method-assign]
        answer = client.post("/v1/completions", json=LONG | {"max_tokens": 2})
        assert answer.status_code == 200
        live.wait_idle()
        assert asyncio.run(live.loop.call(lambda engine: engine.check_integrity())) is None
