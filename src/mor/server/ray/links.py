"""The replica's end of shared streams: all tokens of a tick go to a front in one message.

A stream of its own for each request would cross Ray once per token and request. A front keeps one
more call open per replica, its *link*; what requests of that front answer goes there. Each request
keeps its own call besides, which says who took it, counts as load, and gives it up when cancelled.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from starlette.types import Message

from mor.server.ray.calls import add_message

Batch = dict[int, list[Message | None]]
"""Messages by ticket, in order; None is the end of an answer."""

IDLE = 1.0
"""Seconds after which a link that carries nothing ends: a draining replica waits for it."""
PACE = 0.005
"""Seconds between two batches, at least: ticks that are shorter are sent together."""


@dataclass(frozen=True)
class Open:
    """What a front sends to open a link.

    Attributes:
        front: who it is.
        number: of the link; no other of this front has it.
        replica: the only one that is meant.
    """

    front: str
    number: int
    replica: str


@dataclass
class Link:
    """One front's link, while it is open.

    Attributes:
        number: of the link.
        carried: answers under way that go through it.
        pending: what has not been sent yet.
    """

    number: int
    carried: int = 0
    pending: Batch = field(default_factory=dict)
    _woken: asyncio.Event = field(default_factory=asyncio.Event)

    @contextmanager
    def carry(self, ticket: int) -> Iterator[Callable[[Message], None]]:
        """Take an answer: gives what takes its messages. Its end is told however it comes."""
        self.carried += 1
        try:
            yield lambda message: self._put(ticket, message)
        finally:
            self.carried -= 1
            self._put(ticket, None)

    def _put(self, ticket: int, message: Message | None) -> None:
        own = self.pending.setdefault(ticket, [])
        if message is None:
            own.append(None)
        else:
            add_message(own, message)
        self._woken.set()

    async def take(self, seconds: float) -> Batch:
        """All that is pending; empty where nothing came for so long."""
        if not self.pending:
            self._woken.clear()
            try:
                async with asyncio.timeout(seconds):
                    await self._woken.wait()
            except TimeoutError:
                pass
        batch, self.pending = self.pending, {}
        return batch


class Links:
    """The links of a replica, one per front; all in one event loop.

    Args:
        idle, pace: seconds; see :data:`IDLE` and :data:`PACE`.
    """

    def __init__(self, idle: float = IDLE, pace: float = PACE) -> None:
        self.idle, self.pace = idle, pace
        self._open: dict[str, Link] = {}

    def of(self, front: str) -> Link | None:
        """The link of a front; None where it has none open."""
        return self._open.get(front)

    async def batches(self, asked: Open) -> AsyncIterator[Batch]:
        """Open a link, and give what goes through it until nothing has for a while.

        From its end on no answer is given to it: that is decided here and at the start of an
        answer, in one thread, so nothing is ever put into a link that has ended.
        """
        link = self._open[asked.front] = Link(asked.number)
        try:
            while True:
                batch = await link.take(self.idle)
                if batch:
                    yield batch
                    await asyncio.sleep(self.pace)
                elif not link.carried:
                    return
        finally:
            if self._open.get(asked.front) is link:
                del self._open[asked.front]
