"""Many requests of random lengths, every fifth client leaves: nothing is lost."""

from __future__ import annotations

import asyncio
import json
import os
import random
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import httpx
import pytest

from mor.engine import SamplingParams
from tests.server.live import NAME, Live, make_engine, serving, tokenizer

# All of them by HYPOTHESIS_PROFILE=deep.
REQUESTS = 2000 if os.environ.get("HYPOTHESIS_PROFILE") == "deep" else 200
CLIENTS = 48


@dataclass(frozen=True)
class Asked:
    """One request, and after how many of its tokens the client leaves; None: it stays."""

    prompt: tuple[int, ...]
    max_tokens: int
    seed: int
    greedy: bool
    depth_cap: int
    stream: bool
    leaves: int | None

    def body(self) -> dict[str, Any]:
        return {
            "model": NAME, "prompt": list(self.prompt), "max_tokens": self.max_tokens,
            "seed": self.seed, "temperature": 0.0 if self.greedy else 1.0, "stream": self.stream,
            "depth_cap": self.depth_cap, "ignore_eos": True, "return_token_ids": True,
        }  # fmt: skip

    def params(self) -> SamplingParams:
        return SamplingParams(
            max_tokens=self.max_tokens, seed=self.seed, temperature=0.0 if self.greedy else 1.0,
            max_depth=self.depth_cap, ignore_eos=True,
        )  # fmt: skip


def random_requests(draw: random.Random) -> list[Asked]:
    """Of few kinds, so that the single-request answers are soon made."""
    kinds = [
        Asked(
            prompt=tuple(draw.randrange(2, len(tokenizer())) for _ in range(draw.randint(1, 20))),
            max_tokens=draw.randint(1, 11),
            seed=number,
            greedy=draw.random() < 0.5,
            depth_cap=draw.choice([1, 2, 3, 3]),
            stream=True,
            leaves=None,
        )
        for number in range(60)
    ]
    asked = []
    for _ in range(REQUESTS):
        kind = draw.choice(kinds)
        leaves = draw.randint(0, kind.max_tokens - 1) if draw.random() < 0.2 else None
        fields = vars(kind) | {"stream": draw.random() < 0.5, "leaves": leaves}
        if leaves is not None:  # long enough that it is not over before the client leaves
            fields["max_tokens"] = 60
        asked.append(Asked(**fields))
    return asked


async def ask(client: httpx.AsyncClient, asked: Asked) -> tuple[list[int], list[int]] | None:
    """Tokens and depths; None where the client left."""
    while True:
        if asked.leaves is not None and not asked.stream:
            # After some time, whatever is done by then.
            with suppress(TimeoutError, httpx.HTTPError):
                await asyncio.wait_for(
                    client.post("/v1/completions", json=asked.body()), 0.01 * (1 + asked.leaves)
                )
            return None
        tokens: list[int] = []
        depths: list[int] = []
        async with client.stream("POST", "/v1/completions", json=asked.body()) as answer:
            if answer.status_code == 429:
                await answer.aread()
                await asyncio.sleep(0.25)  # asked at once, refusals would be most of the work
                continue
            assert answer.status_code == 200, await answer.aread()
            if not asked.stream:
                choices = [json.loads(await answer.aread())["choices"][0]]
                return choices[0]["token_ids"], choices[0]["depths"]
            async for line in answer.aiter_lines():
                if not line or line == "data: [DONE]":
                    continue
                if asked.leaves is not None and len(tokens) >= asked.leaves:
                    return None
                choice = json.loads(line.removeprefix("data: "))["choices"][0]
                tokens += choice["token_ids"]
                depths += choice["depths"]
        return tokens, depths


async def load(live: Live, every: list[Asked]) -> list[tuple[list[int], list[int]] | None]:
    todo = iter(list(enumerate(every)))
    answers: list[tuple[list[int], list[int]] | None] = [None] * len(every)
    limits = httpx.Limits(max_connections=CLIENTS, max_keepalive_connections=CLIENTS)

    async def work(client: httpx.AsyncClient) -> None:
        for place, asked in todo:
            answers[place] = await ask(client, asked)

    async with httpx.AsyncClient(base_url=live.url, timeout=120.0, limits=limits) as client:
        await asyncio.gather(*(work(client) for _ in range(CLIENTS)))
    return answers


@pytest.mark.slow
def test_many_requests_of_which_some_leave() -> None:
    every = random_requests(random.Random(11))
    kinds = {(a.prompt, a.max_tokens, a.seed): a for a in every if a.leaves is None}
    wanted, alone = {}, make_engine()
    for key, asked in kinds.items():
        (output,) = alone.generate([list(asked.prompt)], asked.params())
        done = output.completions[0]
        wanted[key] = (list(done.token_ids), list(done.depths))
    # So few pages that requests have to give way to others, and so little room that some wait.
    engine = make_engine(max_num_seqs=16, num_pages=104, page_size=4)
    with serving(engine, max_waiting=8) as live:
        answers = asyncio.run(load(live, every))
        live.wait_idle()
        asyncio.run(live.loop.call(lambda engine: engine.check_integrity()))
        assert engine.store.pool.used == 0
        assert live.metric("mor:request_rejected_total") > 0
        stayed = [a for a in every if a.leaves is None]
        left = live.metric("mor:request_aborted_total")
        ended = live.metric("mor:request_success_total")
        assert left + ended >= len(stayed)
        # Of those that left, many were through before anybody noticed: the answers are short.
        assert left > 0.02 * REQUESTS
        assert engine.stats.preemptions > 0, engine.stats
    assert 0.75 * REQUESTS < len(stayed) < 0.85 * REQUESTS
    for asked, answer in zip(every, answers, strict=True):
        if asked.leaves is None:
            assert answer == wanted[asked.prompt, asked.max_tokens, asked.seed]
        else:
            assert answer is None
