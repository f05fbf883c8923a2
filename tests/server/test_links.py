"""Answers of a replica that share one stream to the front: the same bytes, and none is lost."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any

import pytest
from starlette.types import Message, Receive, Scope, Send

from mor.server.ray.backend import ReplicaLost
from mor.server.ray.calls import Call, Taken, add_message
from mor.server.ray.front import Front
from mor.server.ray.held import Held
from mor.server.ray.linked import LinkedBackend
from mor.server.ray.links import Batch, Links, Open
from mor.server.ray.replica import Replica
from mor.server.ray.totals import Totals

EVENTS = {"content-type": "text/event-stream"}
Steps = Callable[[], Awaitable[None]]


def token(number: int) -> bytes:
    event = {"choices": [{"depths": [1], "finish_reason": None, "token": number}]}
    return f"data: {json.dumps(event)}\n\n".encode()


class Ticking:
    """An application whose streams say a token each at every tick, all at once, like an engine."""

    def __init__(self) -> None:
        self.waiting: list[asyncio.Future[None]] = []
        self.left: list[str] = []
        self.state = SimpleNamespace(mor=SimpleNamespace(loop=None))
        self.router = SimpleNamespace(lifespan_context=self.live)

    @asynccontextmanager
    async def live(self, app: Any) -> AsyncIterator[None]:
        yield

    async def tick(self) -> None:
        waiting, self.waiting = self.waiting, []
        for one in waiting:
            if not one.done():
                one.set_result(None)
        for _ in range(30):  # until all that follows from it is through
            await asyncio.sleep(0)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = [(k.encode(), v.encode()) for k, v in EVENTS.items()]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        try:
            for number in range(int(scope["path"][1:])):
                self.waiting.append(asyncio.get_running_loop().create_future())
                await self.waiting[-1]
                body = token(number)
                await send({"type": "http.response.body", "body": body, "more_body": True})
        except asyncio.CancelledError:
            self.left.append(scope["path"])
            raise
        await send({"type": "http.response.body", "body": b"data: [DONE]\n\n"})


class Local:
    """Replicas in this process; ``dead`` ones give nothing more, on links and streams alike."""

    def __init__(self, *replicas: Replica) -> None:
        self.replicas = {one.name: one for one in replicas}
        self.dead: set[str] = set()
        self.batches: list[Batch] = []
        self.own: list[Any] = []

    async def ask(self, call: Call) -> AsyncGenerator[Taken | list[Message], None]:
        name = next(n for n in self.replicas if n not in self.dead and n not in call.avoid)
        async for item in self._alive(name, self.replicas[name].answer(call)):
            self.own.append(item)
            yield item

    async def open(self, asked: Open) -> AsyncGenerator[Batch, None]:
        async for batch in self._alive(asked.replica, self.replicas[asked.replica].link(asked)):
            self.batches.append(batch)
            yield batch

    async def _alive(self, name: str, items: Any) -> AsyncGenerator[Any, None]:
        try:
            async for item in items:
                if name in self.dead:
                    raise ReplicaLost("kill -9")
                yield item
        finally:
            await items.aclose()

    async def tell(self) -> list[dict[str, Any]]:
        return []


class World:
    """A front, one or two replicas, and clients."""

    def __init__(self, *names: str) -> None:
        self.apps = {name: Ticking() for name in names}
        made = [Replica(app, name) for name, app in self.apps.items()]  # type: ignore[arg-type]
        for one in made:
            one.links = Links(idle=0.05, pace=0.0)
        self.streams = Local(*made)
        self.backend = LinkedBackend(self.streams)
        self.front = Front(self.backend, Totals("m"))

    def ask(self, tokens: int) -> tuple[asyncio.Task[None], list[Message]]:
        heard: list[Message] = []
        body = [{"type": "http.request", "body": b"{}", "more_body": False}]
        scope = {"type": "http", "method": "POST", "path": f"/{tokens}", "headers": []}

        async def receive() -> Message:
            return body.pop() if body else await asyncio.Future()

        async def send(message: Message) -> None:
            heard.append(message)

        return asyncio.create_task(self.front(scope, receive, send)), heard

    async def tick(self, times: int = 1) -> None:
        for _ in range(times):
            await asyncio.sleep(0.001)
            for app in self.apps.values():
                await app.tick()

    async def finish(self, *tasks: asyncio.Task[None]) -> None:
        for _ in range(200):
            if all(task.done() for task in tasks):
                break
            await self.tick()
        assert all(task.done() for task in tasks)
        await asyncio.gather(*tasks)


def text(heard: list[Message]) -> bytes:
    return b"".join(message.get("body", b"") for message in heard)


def whole(tokens: int) -> bytes:
    return b"".join(map(token, range(tokens))) + b"data: [DONE]\n\n"


def run(story: Callable[[World], Awaitable[None]], *names: str) -> World:
    async def go() -> World:
        world = World(*names or ("a",))
        await story(world)
        await world.backend.close()
        assert not world.backend._inboxes
        assert not world.backend._readers
        return world

    return asyncio.run(go())


def test_all_tokens_of_a_tick_come_in_one_batch() -> None:
    async def story(world: World) -> None:
        first, heard = world.ask(1)  # in its own stream; the link is opened beside it
        await world.finish(first)
        assert text(heard) == whole(1)
        world.streams.batches.clear()
        world.streams.own.clear()
        asked = [world.ask(5 + n) for n in range(4)]
        await world.finish(*(task for task, _ in asked))
        for place, (_, heard) in enumerate(asked):
            assert text(heard) == whole(5 + place)
            assert heard[-1].get("more_body", False) is False
        assert [len(item) for item in world.streams.own] == [2] * 4  # only who took it
        tokens = [b for b in world.streams.batches if len(b) == 4]
        assert len(tokens) >= 5
        assert len(world.streams.batches) <= 12

    run(story)


def test_a_link_ends_when_idle_and_is_opened_again() -> None:
    async def story(world: World) -> None:
        for _ in range(2):
            task, heard = world.ask(2)
            await world.finish(task)
            assert text(heard) == whole(2)
            links = world.streams.replicas["a"].links
            assert links.of(world.backend.front) is not None
            await asyncio.sleep(0.12)
            assert links.of(world.backend.front) is None

    run(story)


@pytest.mark.parametrize("begun", [False, True])
def test_a_replica_that_dies_takes_its_link_along(begun: bool) -> None:
    async def story(world: World) -> None:
        warm, _ = world.ask(1)
        await world.finish(warm)
        asked = [world.ask(4) for _ in range(3)]
        await world.tick(3 if begun else 0)
        if not begun:
            await asyncio.sleep(0.01)
        world.streams.dead.add("a")
        await world.finish(*(task for task, _ in asked))
        for _, heard in asked:
            if begun:
                said = text(heard)
                assert said.startswith(token(0))
                assert b"replica_lost" in said
                assert said.endswith(b"data: [DONE]\n\n")
            else:
                assert text(heard) == whole(4)  # another replica has answered

    world = run(story, "a", "b")
    assert world.front.totals.lost._value.get() == (3 if begun else 0)


def test_a_client_that_leaves_ends_its_answer_and_no_other() -> None:
    async def story(world: World) -> None:
        warm, _ = world.ask(1)
        await world.finish(warm)
        (leaves, _), (stays, heard) = world.ask(50), world.ask(6)
        await world.tick(3)
        leaves.cancel()
        await world.finish(stays)
        assert text(heard) == whole(6)
        assert world.apps["a"].left == ["/50"]
        assert world.streams.replicas["a"].links.of(world.backend.front).carried == 0  # type: ignore[union-attr]

    run(story)


def test_a_front_that_is_behind_gets_what_came_meanwhile_in_one_piece() -> None:
    async def story() -> None:
        links = Links(idle=0.01, pace=0.0)
        found = []
        source = links.batches(Open("f", 1, "a"))
        reading = asyncio.ensure_future(anext(source))
        await asyncio.sleep(0)
        link = links.of("f")
        assert link is not None
        with link.carry(7) as put:
            for number in range(3):
                put({"type": "http.response.body", "body": token(number), "more_body": True})
            found.append(await reading)
        found += [batch async for batch in source]
        one = {"type": "http.response.body", "body": whole(3)[: -len(b"data: [DONE]\n\n")]}
        assert found == [{7: [{**one, "more_body": True}]}, {7: [None]}]
        assert links.of("f") is None

    asyncio.run(story())


def test_joined_events_are_still_seen_one_by_one() -> None:
    opening = b'data: {"choices": [{"depths": [], "finish_reason": null}]}\n\n'
    refusal = b'data: {"error": {"code": "shutting_down"}}\n\ndata: [DONE]\n\n'
    headers = [(k.encode(), v.encode()) for k, v in EVENTS.items()]
    start: Message = {"type": "http.response.start", "status": 200, "headers": headers}
    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)

    def held(body: bytes, more: bool) -> Held:
        one = Held(send)
        messages: list[Message | None] = [start]
        for part in (opening, body):
            add_message(messages, {"type": "http.response.body", "body": part, "more_body": True})
        messages[-1]["more_body"] = more  # type: ignore[index]
        asyncio.run(one.take([m for m in messages if m is not None]))
        return one

    for more in (True, False):
        one = held(refusal, more)
        assert (one.retryable, one.sent, sent) == (True, False, [])
    assert not held(b"", True).sent
    assert held(token(0), True).sent
    assert len(sent) == 2
