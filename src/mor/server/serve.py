"""uvicorn around the application, with a shutdown that lets requests finish."""

from __future__ import annotations

import asyncio
import logging
import socket
from types import FrameType
from typing import Protocol

import uvicorn
from fastapi import FastAPI
from starlette.types import ASGIApp

from mor.server.loop import EngineLoop
from mor.server.sockets import refusal, url_of

log = logging.getLogger("uvicorn.error")


class Drains(Protocol):
    """What works on requests, and can be asked to take no more: an engine's loop, a front."""

    @property
    def under_way(self) -> int:
        """Requests or completions that are not over."""

    async def drain(self, seconds: float) -> None:
        """Take no more, and let what is under way finish for so long."""


class DrainingServer(uvicorn.Server):
    """On the first SIGTERM or SIGINT it still answers, but takes no more work; then it ends.

    uvicorn alone closes its door first: a load balancer would see refused connections instead of
    503 and ``/ready``, and requests would have no bound on the time they may still take.

    Args:
        config: uvicorn's.
        loop: the engine's, or what else works on the requests.
        drain_seconds: how long requests may take to finish; then they are aborted.
    """

    def __init__(self, config: uvicorn.Config, loop: Drains, drain_seconds: float) -> None:
        super().__init__(config)
        self.engine_loop, self.drain_seconds = loop, drain_seconds
        self._loop_of_events: asyncio.AbstractEventLoop | None = None
        self._draining: asyncio.Task[None] | None = None
        self._asked = False

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """First signal: drain. A second one: end now."""
        asyncio_loop = self._loop_of_events
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
        self._loop_of_events = asyncio.get_running_loop()
        if self.started and not self.should_exit:
            if isinstance(self.engine_loop, EngineLoop):  # replicas have engines of their own
                log.info("Attention over pages: %s", self.engine_loop.engine.attention)
            for one in sockets or ():
                log.info("Serving, running on %s (press CTRL+C to quit)", url_of(one))

    async def _drain(self) -> None:
        try:
            await self.engine_loop.drain(self.drain_seconds)
        finally:
            self.should_exit = True


def make_server(
    app: ASGIApp,
    host: str = "127.0.0.1",
    port: int = 8000,
    *,
    loop: Drains | None = None,
    drain_seconds: float = 30.0,
    log_level: str = "info",
) -> DrainingServer:
    """A server for an application of :func:`mor.server.create_app`; ``run()`` it.

    Args:
        app: of that function, or another one together with its ``loop``.
        host, port: where it listens.
        loop: what is drained; of ``app`` itself where it is None.
        drain_seconds: see :class:`DrainingServer`.
        log_level: of uvicorn.
    """
    if loop is None:
        assert isinstance(app, FastAPI)
        loop = app.state.mor.loop
    config = uvicorn.Config(
        app,
        host=host,
        port=port,
        log_level=log_level,
        timeout_graceful_shutdown=5,  # for answers on their way out; the draining is done by then
        timeout_keep_alive=30,
        server_header=False,
    )
    return DrainingServer(config, loop, drain_seconds)


def serve_on(server: DrainingServer, sockets: list[socket.socket], host: str, port: int) -> None:
    """Serve on bound sockets until a signal comes.

    Raises:
        MorError: another server that began at the same time was ready first.
    """
    try:
        server.run(sockets)
    except OSError as error:
        raise refusal(host, port, error) from None
