"""Replicas as the front sees them: something to ask, and what can become of a question."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Any, Protocol

from starlette.types import Message

from mor.server.ray.calls import Call


class ReplicaLost(Exception):
    """The replica died, or its machine is out of reach; nothing more comes from it."""


class NoReplica(Exception):
    """There is no replica to ask."""


class TooMany(Exception):
    """So many requests wait for a replica that no more are taken."""


class Backend(Protocol):
    """Where answers come from."""

    def ask(self, call: Call) -> AsyncGenerator[str | list[Message], None]:
        """The name of the replica that took ``call``, then messages of ASGI.

        Closing the iteration gives the request up.

        Raises:
            ReplicaLost: on the way.
            NoReplica: there is none.
            TooMany: too many wait.
        """

    async def tell(self) -> list[dict[str, Any]]:
        """What each replica that answers in time says of itself."""
