"""One engine of several: the whole application, called by the front instead of by a network."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from typing import Any

import torch
from starlette.types import Message

from mor.hf.load import open_model
from mor.server.build import Served
from mor.server.ray.calls import Call, call_app
from mor.server.ray.fingerprint import check_fingerprint


class Replica:
    """An engine and its application in a process of their own.

    Args:
        served: the model, and how it is served; keys are the front's business.
        threads: of the CPU.
        expected: the fingerprint of the model that the server was started with.
        name: of this replica.

    Raises:
        MorError: the model is missing here or is another one, or an option does not suit it.
    """

    def __init__(self, served: Served, threads: int, expected: str, name: str) -> None:
        self.name = name
        check_fingerprint(served.model, expected, f"replica {name}")
        torch.set_num_threads(threads)
        self.app = served.application(open_model(served.model, served.dtype), served.check())
        self.loop = self.app.state.mor.loop
        self._stack = AsyncExitStack()
        self._beginning, self._begun = asyncio.Lock(), False

    async def answer(self, call: Call) -> AsyncIterator[str | list[Message]]:
        """First this replica's name, then messages of ASGI, as many at a time as there are."""
        await self.begin()
        yield self.name
        async for messages in call_app(self.app, call):
            yield messages

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
