"""Which cached tokens a request takes over, and which it leaves for others to compute."""

from __future__ import annotations

from collections.abc import Hashable

from mor.engine.prefix import Node
from mor.engine.request import Request
from mor.engine.stats import EngineStats
from mor.engine.store import KVStore


class Reuse:
    """Prefix caching, as the scheduler sees it.

    A request takes over what is cached of its tokens before each of its waves. Where another one is
    just computing what it needs next, it waits for that: several requests with the same beginning
    that come at once compute it once.

    Args:
        store: pages.
        stats: counters.
        on: off, nothing is kept and nobody waits.
    """

    def __init__(self, store: KVStore, stats: EngineStats, on: bool) -> None:
        self.store, self.stats, self.on = store, stats, on
        self._claims: dict[tuple[Node, Hashable], Request] = {}

    def take(self, request: Request) -> None:
        """Go on from the farthest cached place of a resident request's tokens."""
        start = self._start(request)
        if start is None or start.length + self.store.pool.page_size > request.reusable:
            return
        goal = self._goal(request, start)
        prefixes = self.store.prefixes
        if goal is start or prefixes.cost(start, goal) > self.store.pool.free:
            return
        for node in goal.since(start):
            request.position_depths[node.length - len(node.depths) : node.length] = node.depths
        self.store.adopt(request, start, goal)
        taken = goal.length - start.length
        request.computed, request.tail = goal.length, goal
        request.cached_tokens += 0 if request.preemptions else taken
        self.stats.reused_tokens += taken

    def must_wait(self, request: Request) -> bool:
        """Whether another request is computing what this one needs next."""
        if request.computed + self.store.pool.page_size > request.reusable:
            return False
        claim = self._next(request)
        return claim is not None and self._claims.get(claim, request) is not request

    def claim(self, request: Request) -> None:
        """``request`` computes its next tokens now; others may wait for them."""
        claim = self._next(request) if request.claim is None else None
        if claim is not None and claim not in self._claims:
            self._claims[claim], request.claim = request, claim

    def note_left(self, request: Request) -> None:
        """Keep the full pages of what ``request`` has computed."""
        tail = request.tail or self.store.prefixes.root
        if not self.on or request.computed - tail.length < self.store.pool.page_size:
            return
        assert request.row is not None
        self._unclaim(request)
        done = request.computed
        tokens, depths = request.spelling[:done], request.position_depths[:done]
        start = tail if tail.alive else self.store.prefixes.root
        request.tail = self.store.prefixes.learn(start, tokens, depths, request.salt, request.row)

    def forget(self, request: Request) -> None:
        """``request`` is no longer resident; what is kept of it was used just now."""
        self._unclaim(request)
        if request.tail is not None and request.tail.alive:
            self.store.prefixes.touch(request.tail)
        request.tail = None

    def shared_pages(self, request: Request) -> int:
        """Pages that ``request`` would take over and that others read already."""
        start = self._start(request)
        if start is None:
            return 0
        return self.store.prefixes.shared(start, self._goal(request, start))

    def clear(self) -> None:
        """Forget every text; requests under way go on with what they read."""
        self.store.prefixes.clear()

    def _start(self, request: Request) -> Node | None:
        """The node that ``request`` is at; None between two of them."""
        if not self.on:
            return None
        tail = request.tail or self.store.prefixes.root
        return tail if tail.alive and tail.length == request.computed else None

    def _goal(self, request: Request, start: Node) -> Node:
        tokens = request.spelling[: request.reusable]
        return self.store.prefixes.walk(start, tokens, request.salt)

    def _next(self, request: Request) -> tuple[Node, Hashable] | None:
        start = self._start(request)
        if start is None:
            return None
        key = self.store.prefixes.key(start, request.spelling, request.salt)
        return None if key is None else (start, key)

    def _unclaim(self, request: Request) -> None:
        if request.claim is not None:
            del self._claims[request.claim]
            request.claim = None
