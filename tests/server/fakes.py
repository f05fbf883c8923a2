"""Replicas that answer, refuse, fail or die as they are told."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from typing import Any

import httpx
from starlette.types import ASGIApp, Message

from mor.server.ray.backend import ReplicaLost
from mor.server.ray.calls import Call, run_app
from mor.server.ray.front import Front
from mor.server.ray.totals import Totals
from tests.server.live import NAME


@dataclass
class Fakes:
    """Replicas in this process; ``dies`` and ``refuses`` say what befalls calls, by name."""

    apps: dict[str, ASGIApp]
    dies: dict[str, int] = field(default_factory=dict)  # after so many of its messages
    refuses: dict[str, int] = field(default_factory=dict)  # with this status
    wrong: Exception | None = None
    hangs: bool = False
    calls: list[str] = field(default_factory=list)
    closed: int = 0

    async def ask(self, call: Call) -> AsyncGenerator[str | list[Message], None]:
        if self.wrong is not None:
            raise self.wrong
        if self.hangs:
            await asyncio.sleep(3600)
        names = [name for name in self.apps if name not in call.avoid] or list(self.apps)
        name = names[0]
        self.calls.append(name)
        try:
            yield name
            if name in self.refuses:
                body = json.dumps({"error": {"code": "overloaded"}}).encode()
                start = {"type": "http.response.start", "status": self.refuses[name], "headers": []}
                yield [start, {"type": "http.response.body", "body": body}]
                return
            seen = 0
            # Not joined, so that it is known after which message it dies.
            out: asyncio.Queue[Message | None] = asyncio.Queue()
            working = asyncio.create_task(run_app(self.apps[name], call, out.put_nowait))
            working.add_done_callback(lambda _: out.put_nowait(None))
            try:
                while (message := await out.get()) is not None:
                    if seen == self.dies.get(name):
                        raise ReplicaLost("kill -9")
                    seen += 1
                    yield [message]
            finally:
                working.cancel()
        finally:
            self.closed += 1

    async def tell(self) -> list[dict[str, Any]]:
        told = []
        for name, app in self.apps.items():
            state = app.state.mor  # type: ignore[attr-defined]
            text = (await state.loop.call(state.metrics.text)).decode()
            told.append({"name": name, "ready": state.loop.ready, "metrics": text})
        return told


def ask(apps: Any, fakes: Fakes, path: str = "/v1/completions", **fields: Any) -> httpx.Response:
    made, runner = apps
    fakes.apps = fakes.apps or made
    front = Front(fakes, Totals(NAME), patience=0.2)

    async def go() -> httpx.Response:
        transport = httpx.ASGITransport(app=front)
        async with httpx.AsyncClient(transport=transport, base_url="http://front") as client:
            if not fields:
                return await client.get(path)
            return await client.post(path, json=fields)

    answer: httpx.Response = runner.run(go())
    assert fakes.closed == len(fakes.calls)
    return answer


def events(answer: httpx.Response) -> list[Any]:
    lines = [line.removeprefix("data: ") for line in answer.text.split("\n\n") if line]
    return [line if line == "[DONE]" else json.loads(line) for line in lines]
