"""A tick that fails: what was under way is told to try again, and the server goes on."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from mor.engine import Engine, SamplingParams
from mor.server.failures import Restarts
from tests.server.live import NAME, Live, make_engine, model, serving, tokenizer

LONG: dict[str, Any] = {
    "model": NAME, "prompt": "the king said", "max_tokens": 60, "ignore_eos": True,
    "temperature": 0,
}  # fmt: skip


class FaultyEngine(Engine):
    """Its stages raise when the countdown ends, in the middle of a step."""

    faults = 0
    after = 0

    def restart(self) -> None:
        super().restart()
        self.arm()

    def arm(self) -> None:
        leave = self.runner.leave

        def faulty(waves: Any) -> Any:
            self.after -= 1
            if self.faults and self.after < 0:
                self.faults -= 1
                raise RuntimeError("out of memory")
            return leave(waves)

        self.runner.leave = faulty  # type: ignore[method-assign]

    def break_down(self, times: int, after: int = 0) -> None:
        self.after, self.faults = after, times


def faulty_engine() -> FaultyEngine:
    engine = FaultyEngine(model(), tokenizer(), max_num_seqs=4, page_size=4)
    engine.arm()
    return engine


@pytest.fixture(scope="module")
def live() -> Iterator[Live]:
    with serving(faulty_engine(), max_restarts=100) as running:
        yield running


def healthy(live: Live, client: httpx.Client) -> None:
    """It answers as it should, and nothing of the failure is left."""
    for path in ("/ready", "/health"):
        assert client.get(path).status_code == 200
    answer = client.post("/v1/completions", json=LONG).json()
    asked = SamplingParams(max_tokens=60, ignore_eos=True, temperature=0.0)
    wanted = make_engine().generate(LONG["prompt"], asked)[0].completions[0]
    assert answer["choices"][0]["text"] == wanted.text
    live.wait_idle()
    live.engine.check_integrity()


@pytest.mark.parametrize("times", [1, 2])
def test_the_first_tick(live: Live, times: int) -> None:
    """A fault before any token, once and twice in a row."""
    assert isinstance(live.engine, FaultyEngine)
    before = live.metric("mor:engine_restarts_total")
    aborted = live.metric("mor:request_aborted_total")
    live.engine.break_down(times)
    with live.http() as client:
        for _ in range(times):
            answer = client.post("/v1/completions", json=LONG | {"n": 2})
            assert answer.status_code == 503
            assert int(answer.headers["retry-after"]) >= 1
            told = answer.json()["error"]
            assert told["code"] == "engine_restarted"
            assert told["type"] == "service_unavailable_error"
            assert "out of memory" in told["message"]
        healthy(live, client)
    assert live.metric("mor:engine_restarts_total") - before == times
    assert live.metric("mor:request_aborted_total") - aborted == 2 * times


def test_in_the_middle_of_streams(live: Live) -> None:
    assert isinstance(live.engine, FaultyEngine)
    with live.http() as client:
        live.engine.break_down(1, after=10)
        body = LONG | {"stream": True, "n": 2}
        events = client.post("/v1/completions", json=body).text.split("\n\n")
        *_, before, error, end, nothing = events
        assert (end, nothing) == ("data: [DONE]", "")
        assert json.loads(before.removeprefix("data: "))["choices"][0]["text"] is not None
        assert json.loads(error.removeprefix("data: "))["error"]["code"] == "engine_restarted"
        healthy(live, client)


def test_the_openai_client_tries_again_by_itself(live: Live) -> None:
    assert isinstance(live.engine, FaultyEngine)
    live.engine.break_down(1, after=3)
    before = live.metric("mor:engine_restarts_total")
    answer = live.openai(max_retries=2).completions.create(
        model=NAME, prompt="the king said", max_tokens=10, temperature=0
    )
    assert answer.choices[0].finish_reason
    assert live.metric("mor:engine_restarts_total") - before == 1


def test_a_broken_model_does_not_start_again_forever() -> None:
    engine = faulty_engine()
    engine.break_down(1000)
    with serving(engine, max_restarts=2, drain_seconds=0.0) as live, live.http() as client:
        codes = []
        for _ in range(4):
            answer = client.post("/v1/completions", json=LONG)
            codes.append((answer.status_code, answer.json()["error"]["code"]))
        assert codes == [
            (503, "engine_restarted"), (503, "engine_restarted"), (500, "engine_failed"),
            (503, "engine_failed"),
        ]  # fmt: skip
        assert client.get("/ready").status_code == client.get("/health").status_code == 503
        assert live.metric("mor:engine_restarts_total") == 2


def test_an_engine_that_does_not_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = faulty_engine()

    def restart() -> None:
        raise MemoryError("no room for pages")

    monkeypatch.setattr(engine, "restart", restart)
    engine.break_down(1)
    with serving(engine, drain_seconds=0.0) as live, live.http() as client:
        answer = client.post("/v1/completions", json=LONG)
        assert (answer.status_code, answer.json()["error"]["code"]) == (500, "engine_failed")
        assert client.get("/ready").status_code == 503


def test_restarts_are_counted_within_a_window() -> None:
    restarts = Restarts(2, window=10.0)
    assert [restarts.take(now) for now in (0.0, 1.0, 2.0, 9.9)] == [True, True, False, False]
    assert [restarts.take(now) for now in (10.0, 10.5, 11.0, 11.5)] == [True, False, True, False]
    assert not Restarts(0).take(time.monotonic())


def test_usage_counts_cached_tokens() -> None:
    """The second turn of a chat finds the first, answer included."""
    with serving(make_engine()) as live:
        client, said = live.openai(), [{"role": "user", "content": "the king said to the queen"}]
        cached = []
        for stream in (False, True):
            fields: dict[str, Any] = {"model": NAME, "messages": said, "max_tokens": 9}
            if stream:
                more: dict[str, Any] = {"stream": True, "stream_options": {"include_usage": True}}
                *_, last = client.chat.completions.create(**fields, **more)
                usage = last.usage
            else:
                whole = client.chat.completions.create(**fields, n=2)
                usage, text = whole.usage, whole.choices[0].message.content
                said = [*said, {"role": "assistant", "content": text}, *said]
            cached.append(usage.prompt_tokens_details.cached_tokens)
            assert 0 <= cached[-1] < usage.prompt_tokens
        assert cached[0] == 0  # of two completions one had to compute it
        assert cached[1] >= 8
        assert live.metric("mor:prefix_cache_hits_total") >= sum(cached)
    with serving(make_engine(prefix_caching=False)) as live:
        for _ in range(2):
            answer = live.openai().completions.create(
                model=NAME, prompt="the king said to the queen", max_tokens=2
            )
            assert answer.usage is not None
            assert answer.usage.prompt_tokens_details is not None
            assert answer.usage.prompt_tokens_details.cached_tokens == 0
