"""Who guesses tokens, and how many: self-speculation as the scheduler sees it."""

from __future__ import annotations

from collections.abc import Sequence

from mor.engine.draft import Draft
from mor.engine.options import Speculate
from mor.engine.pace import Pace
from mor.engine.request import Request, Wave
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
        goal = self.pace.goal
        if not goal:
            return None
        wanted = min(goal, request.max_new - request.made - 1)
        if wanted < 1 or not request.made or request.limit <= self.asked.depth:
            return None
        if request.constraint is not None:  # it cannot take tokens back
            return None
        # Others shall not give way to guesses.
        tokens = wanted + self.store.pool.page_size
        if self.store.most_pages(tokens, request.limit) > self.store.pool.free:
            return None
        return Draft(wanted, self.asked.depth, self.store.lengths(request))

    def next_wave(self, request: Request, draft: Draft, lanes: int) -> Wave | None:
        """The next guess; or all of them, what they left behind forgotten, to be checked together.

        None where these have to wait for lanes, of which ``lanes`` are free.
        """
        if not draft.complete:
            start = request.computed + len(draft.tokens)
            return Wave(request, start, 1, False, draft.depth)
        count = 1 + draft.wanted
        if count > lanes:
            return None
        self.store.rewind(request, draft.lengths)
        return Wave(request, request.computed, count, True)

    def note_step(self, seconds: float, tokens: int, running: Sequence[Request]) -> None:
        """Note how long one step took, and the tokens that it sampled."""
        if self.pace.always:
            return
        # Where one reads its prompt (or, after it gave way, its tokens), time goes into that.
        waves = [request.wave for request in running if request.draft is None]
        if not any(wave is not None and wave.prompt for wave in waves):
            self.pace.note(seconds, tokens, len(running))
