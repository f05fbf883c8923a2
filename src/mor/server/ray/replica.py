"""One engine of several: the whole application, called by the front instead of by a network."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from typing import Any

import torch
from fastapi import FastAPI
from starlette.types import Message

from mor.engine.opening import open_servable
from mor.server.build import Served
from mor.server.ray.calls import Call, Taken, call_app, run_app
from mor.server.ray.fingerprint import check_fingerprint
from mor.server.ray.links import Batch, Links, Open


def load_app(served: Served, threads: int, expected: str, name: str) -> FastAPI:
    """The application of a replica, with its model.

    Args:
        served: the model, and how it is served; keys are the front's business.
        threads: of the CPU.
        expected: the fingerprint of the model that the server was started with.
        name: of the replica.

    Raises:
        MorError: the model is missing here or is another one, or an option does not suit it.
    """
    check_fingerprint(served.model, expected, f"replica {name}")
    torch.set_num_threads(threads)
    return served.application(open_servable(served.model, served.dtype), served.check())


class Replica:
    """An engine and its application in a process of their own.

    Args:
        app: of :meth:`mor.server.build.Served.application`.
        name: of this replica.
    """

    def __init__(self, app: FastAPI, name: str) -> None:
        self.app, self.name = app, name
        self.loop = self.app.state.mor.loop
        self.links = Links()
        self._stack = AsyncExitStack()
        self._beginning, self._begun = asyncio.Lock(), False

    async def answer(self, call: Call) -> AsyncIterator[Taken | list[Message]]:
        """First this replica's word, then messages of ASGI, as many at a time as there are.

        Where the front has a link open, the messages go there, and this ends when they do.
        """
        await self.begin()
        link = self.links.of(call.front)
        if link is None:
            yield Taken(self.name)
            async for messages in call_app(self.app, call):
                yield messages
            return
        with link.carry(call.ticket) as put:
            yield Taken(self.name, link.number)
            await run_app(self.app, call, put)

    async def link(self, asked: Open) -> AsyncIterator[Batch]:
        """What all answers to a front say, a tick at a time; nothing where another is meant."""
        await self.begin()
        if asked.replica == self.name:
            async for batch in self.links.batches(asked):
                yield batch

    async def begin(self) -> None:
        """Start the engine's thread, once; in the event loop that answers."""
        async with self._beginning:
            if not self._begun:
                await self._stack.enter_async_context(self.app.router.lifespan_context(self.app))
                self._begun = True

    async def end(self) -> None:
        """Give up what is under way, and end the engine's thread."""
        await self._stack.aclose()

    async def tell(self) -> dict[str, Any]:
        """Its name, process, whether it takes requests, and its metrics in Prometheus' format."""
        await self.begin()
        state = self.app.state.mor
        text = await self.loop.call(state.metrics.text)
        return {
            "name": self.name,
            "pid": os.getpid(),
            "ready": self.loop.ready,
            "under_way": self.loop.under_way,
            "metrics": text.decode(),
        }

    async def check_health(self) -> None:
        """Called by Ray Serve now and then; what raises is started anew.

        Raises:
            RuntimeError: the engine is down.
        """
        await self.begin()
        if self.loop.failure is not None:
            raise RuntimeError(f"the engine failed: {self.loop.failure}")
