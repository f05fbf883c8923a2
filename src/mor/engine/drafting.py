"""Who guesses tokens, and how many: self-speculation as the scheduler sees it."""

from __future__ import annotations

from mor.engine.draft import Draft
from mor.engine.options import Speculate
from mor.engine.pace import Pace
from mor.engine.request import Request
from mor.engine.store import KVStore


class Drafting:
    """Begins drafts.

    Args:
        store: pages.
        asked: how many tokens at what depth.

    Attributes:
        pace: how many tokens it pays to guess.
    """

    def __init__(self, store: KVStore, asked: Speculate) -> None:
        self.store, self.asked = store, asked
        self.pace = Pace(asked.tokens, asked.always or not asked.tokens)

    @property
    def goal(self) -> int:
        """Tokens that are guessed at a time now; 0 while it does not pay, or is not asked for."""
        return self.pace.goal

    def begin(self, request: Request) -> Draft | None:
        """A draft for a request whose last token alone is not computed; None to go on as usual.

        Never more guesses than the answer has room for beside the token that checking them adds,
        so that a request needs no place that it would not need anyway.
        """
        wanted = min(self.pace.goal, request.max_new - request.made - 1)
        if wanted < 1 or not request.made or request.limit <= self.asked.depth:
            return None
        if request.constraint is not None:  # it cannot take tokens back
            return None
        # Others shall not give way to guesses.
        tokens = wanted + self.store.pool.page_size
        if self.store.most_pages(tokens, request.limit) > self.store.pool.free:
            return None
        return Draft(wanted, self.asked.depth, self.store.lengths(request))
