"""The front's end of shared streams: one link per replica, and what comes there by ticket."""

from __future__ import annotations

import asyncio
import itertools
import uuid
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from starlette.types import Message

from mor.server.ray.backend import NoReplica, ReplicaLost, TooMany
from mor.server.ray.calls import Call, Taken, add_message
from mor.server.ray.links import Batch, Open

_LOST = object()  # in an inbox: nothing more comes


class Streams(Protocol):
    """Replicas that can be asked, each answer in a stream of its own or through a link."""

    def ask(self, call: Call) -> AsyncGenerator[Taken | list[Message], None]:
        """Who took ``call``, then its messages where no link carries them.

        Raises:
            ReplicaLost, NoReplica, TooMany: see :class:`mor.server.ray.backend.Backend`.
        """

    def open(self, asked: Open) -> AsyncGenerator[Batch, None]:
        """What goes through a link; ends where the replica closes it, or never opened it.

        Raises:
            ReplicaLost: on the way.
        """

    async def tell(self) -> list[dict[str, Any]]:
        """What each replica that answers in time says of itself."""


@dataclass
class _Reader:
    """A link that is open."""

    asked: Open
    tickets: set[int] = field(default_factory=set)
    task: asyncio.Task[None] | None = None


class LinkedBackend:
    """A :class:`mor.server.ray.backend.Backend` that has a link to each replica that it uses.

    The first answer of a replica comes in its own stream, and a link is opened meanwhile. Messages
    that come while the front is busy are joined: it sends them to the client in one piece.

    Args:
        streams: of the replicas.
    """

    def __init__(self, streams: Streams) -> None:
        self.streams = streams
        self.front = uuid.uuid4().hex
        self._numbers = itertools.count(1)
        self._inboxes: dict[int, asyncio.Queue[Any]] = {}
        self._readers: dict[str, _Reader] = {}  # by replica

    async def tell(self) -> list[dict[str, Any]]:
        """See :class:`mor.server.ray.backend.Backend`."""
        return await self.streams.tell()

    async def ask(self, call: Call) -> AsyncGenerator[str | list[Message], None]:
        """See :class:`mor.server.ray.backend.Backend`."""
        ticket, inbox = next(self._numbers), asyncio.Queue[Any]()
        call = replace(call, front=self.front, ticket=ticket)
        # Before it is sent: the link may be faster than the word about who took it.
        self._inboxes[ticket] = inbox
        try:
            async with aclosing(self.streams.ask(call)) as own:
                taken = await anext(own, None)
                if taken is None:
                    return
                assert isinstance(taken, Taken)
                yield taken.replica
                reader = self._reader(taken.replica)
                if taken.link is None:
                    async for more in own:
                        assert not isinstance(more, Taken)
                        yield more
                    return
                async with aclosing(self._carried(own, taken.link, reader, ticket)) as carried:
                    async for messages in carried:
                        yield messages
        finally:
            del self._inboxes[ticket]

    async def _carried(
        self, own: AsyncGenerator[Any, None], link: int, reader: _Reader, ticket: int
    ) -> AsyncGenerator[list[Message], None]:
        """An answer that comes by a link; its own stream runs beside it, for its end or death."""
        inbox = self._inboxes[ticket]
        running = asyncio.ensure_future(_exhaust(own))

        def ended(task: asyncio.Future[None]) -> None:
            if not task.cancelled() and task.exception() is not None:
                inbox.put_nowait(_LOST)  # a sound end may come before the last of the link

        running.add_done_callback(ended)
        if reader.asked.number == link:
            reader.tickets.add(ticket)
        else:  # that link has ended: all that it brought is here already
            inbox.put_nowait(_LOST)
        try:
            async for messages in _read(inbox):
                yield messages
            await running
        except ReplicaLost:
            if running.done():
                running.result()  # which may know better
            raise
        finally:
            reader.tickets.discard(ticket)
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)

    def _reader(self, replica: str) -> _Reader:
        """The link to a replica, opened where there is none."""
        reader = self._readers.get(replica)
        if reader is None:
            reader = _Reader(Open(self.front, next(self._numbers), replica))
            self._readers[replica] = reader
            reader.task = asyncio.create_task(self._run(reader))
        return reader

    async def _run(self, reader: _Reader) -> None:
        try:
            async with aclosing(self.streams.open(reader.asked)) as batches:
                async for batch in batches:
                    for ticket, messages in batch.items():
                        inbox = self._inboxes.get(ticket)
                        if inbox is not None:  # else its client has gone
                            inbox.put_nowait(messages)
        except (NoReplica, ReplicaLost, TooMany):  # each answer that it carried says so
            pass
        finally:
            del self._readers[reader.asked.replica]
            for ticket in reader.tickets:
                self._inboxes[ticket].put_nowait(_LOST)

    async def close(self) -> None:
        """End all links."""
        tasks = [reader.task for reader in self._readers.values() if reader.task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _exhaust(items: AsyncGenerator[Any, None]) -> None:
    """Run a stream that says nothing to its end."""
    async for _ in items:
        pass


async def _read(inbox: asyncio.Queue[Any]) -> AsyncIterator[list[Message]]:
    """What came for an answer until its end, as much at a time as there is.

    Raises:
        ReplicaLost: the link ended before it.
    """
    while True:
        items = [await inbox.get()]
        while not inbox.empty():
            items.append(inbox.get_nowait())
        ready: list[Message | None] = []
        over = lost = False
        for item in items:
            lost = lost or item is _LOST
            for message in () if item is _LOST else item:
                if message is None:
                    over = True
                else:
                    add_message(ready, message)
        if ready:
            yield [message for message in ready if message is not None]
        if over:
            return
        if lost:
            raise ReplicaLost("the stream from it has ended")
