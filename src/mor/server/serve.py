"""uvicorn around the application, with a shutdown that lets requests finish."""

from __future__ import annotations

import asyncio
import logging
import socket
from types import FrameType
from typing import Protocol

import uvicorn
from fastapi import FastAPI

from mor.server.sockets import url_of

log = logging.getLogger("uvicorn.error")


class Drained(Protocol):
    """What is asked before the server ends: an engine's loop, or a classifier."""

    @property
    def under_way(self) -> int:
        """How much is not answered yet."""

    @property
    def asyncio_loop(self) -> asyncio.AbstractEventLoop | None:
        """Where it runs; None before the start."""

    def describe(self) -> str:
        """What is served, in a line of the log."""

    async def drain(self, seconds: float) -> None:
        """Take no more, and let what is under way finish for so long."""


class DrainingServer(uvicorn.Server):
    """On the first SIGTERM or SIGINT it still answers, but takes no more work; then it ends.

    uvicorn alone closes its door first: a load balancer would see refused connections instead of
    503 and ``/ready``, and requests would have no bound on the time they may still take.

    Args:
        config: uvicorn's.
        loop: what works on requests.
        drain_seconds: how long requests may take to finish; then they are aborted.
    """

    def __init__(self, config: uvicorn.Config, loop: Drained, drain_seconds: float) -> None:
        super().__init__(config)
        self.engine_loop, self.drain_seconds = loop, drain_seconds
        self._draining: asyncio.Task[None] | None = None
        self._asked = False

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """First signal: drain. A second one: end now."""
        asyncio_loop = self.engine_loop.asyncio_loop
        if self._asked or asyncio_loop is None:
            self.should_exit = True
            return
        self._asked = True
        asyncio_loop.call_soon_threadsafe(self.begin_drain)

    def begin_drain(self) -> None:
        """Called in asyncio's thread."""
        log.info(
            "Draining: %d completions have %g seconds to finish",
            self.engine_loop.under_way,
            self.drain_seconds,
        )
        self._draining = asyncio.create_task(self._drain())

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, and say where."""
        await super().startup(sockets)
        if self.started and not self.should_exit:
            log.info("%s", self.engine_loop.describe())
            for one in sockets or ():
                log.info("Serving, running on %s (press CTRL+C to quit)", url_of(one))

    async def _drain(self) -> None:
        try:
            await self.engine_loop.drain(self.drain_seconds)
        finally:
            self.should_exit = True


def make_server(
    app: FastAPI,
    host: str = "127.0.0.1",
    port: int = 8000,
    *,
    drain_seconds: float = 30.0,
    log_level: str = "info",
) -> DrainingServer:
    """A server for an application of this package; ``run()`` it."""
    config = uvicorn.Config(
        app,
        host=host,
        port=port,
        log_level=log_level,
        timeout_graceful_shutdown=5,  # for answers on their way out; the draining is done by then
        timeout_keep_alive=30,
        server_header=False,
    )
    return DrainingServer(config, app.state.mor.loop, drain_seconds)
