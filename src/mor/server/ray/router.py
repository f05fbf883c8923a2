"""Ray Serve's request router, with our rule: a request goes to the replica that has its pages."""

from __future__ import annotations

from typing import Any

from ray.serve.request_router import (
    PendingRequest,
    ReplicaID,
    RequestRouter,
    RunningReplica,
)

from mor.server.ray.calls import Call
from mor.server.ray.links import Open
from mor.server.ray.prefixes import PrefixTable


class PrefixRouter(RequestRouter):
    """Ranks replicas by :class:`mor.server.ray.prefixes.PrefixTable`; Serve takes the first free.

    One lives in each process that sends requests, beside its handle.
    """

    def initialize_state(self, slack: int = 4) -> None:
        """Called by Ray Serve, with ``request_router_kwargs``."""
        self.table = PrefixTable(slack)
        self.under_way: dict[str, str] = {}  # the replica of a request
        self.known: set[str] = set()

    async def choose_replicas(
        self,
        candidate_replicas: list[RunningReplica],
        pending_request: PendingRequest | None = None,
    ) -> list[list[RunningReplica]]:
        """Each replica as a rank of its own, the best first."""
        found = {one.replica_id.unique_id: one for one in candidate_replicas}
        for gone in self.known - set(found):
            self.table.forget(gone)
        self.known = set(found)
        asked = _asked(pending_request)
        if isinstance(asked, Open) and asked.replica in found:
            return [[found[asked.replica]]]
        call = asked if isinstance(asked, Call) else None
        avoid = set(call.avoid) if call else set()
        names = [name for name in found if name not in avoid] or list(found)
        own = list(self.under_way.values())
        loads = {name: max(own.count(name), self._told(found[name].replica_id)) for name in names}
        if pending_request is not None:
            pending_request.routing_context.should_backoff = True
        ranked = self.table.rank(call.blocks if call else (), loads)
        return [[found[name]] for name in ranked]

    def _told(self, replica: ReplicaID) -> int:
        """Requests under way by what the replica said last."""
        return self.replica_queue_len_cache.get(replica) or 0

    def on_request_routed(
        self, pending_request: PendingRequest, replica_id: ReplicaID, result: Any
    ) -> None:
        """A replica has taken a request: from now on it has its pages."""
        asked, name = _asked(pending_request), replica_id.unique_id
        if isinstance(asked, Call):
            self.under_way[pending_request.metadata.internal_request_id] = name
            self.table.record(asked.blocks, name)

    def on_request_completed(self, replica_id: ReplicaID, internal_request_id: str) -> None:
        """It has ended, however."""
        self.under_way.pop(internal_request_id, None)


def _asked(pending: PendingRequest | None) -> Any:
    """What a request of ours is about."""
    return pending.args[0] if pending is not None and pending.args else None
