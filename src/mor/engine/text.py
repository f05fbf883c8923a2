"""Text of tokens as they come."""

from __future__ import annotations

from typing import Any

from mor.engine.stops import StopSearch

_BROKEN = "\ufffd"  # what a tokenizer writes for part of a character


class GrowingText:
    """The text of one completion, which grows token by token and never changes behind.

    A few tokens before the new ones are decoded along, since they decide about spaces and about
    characters of several tokens (as in text-generation-inference).

    Args:
        tokenizer: any with ``decode(ids, skip_special_tokens=...)``.
        stops: texts that end the completion.
    """

    def __init__(self, tokenizer: Any, stops: tuple[str, ...]) -> None:
        self.tokenizer = tokenizer
        self._ids: list[int] = []
        self._prefix = self._read = 0
        self._text = ""
        self._search = StopSearch(stops)
        self.stopped_by: str | None = None

    def _decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    def push(self, token: int) -> bool:
        """Add a token; whether a stop text is complete now."""
        self._ids.append(token)
        before = self._decode(self._ids[self._prefix : self._read])
        after = self._decode(self._ids[self._prefix :])
        if after.endswith(_BROKEN):
            return False
        fresh = after[len(before) :]
        self._prefix, self._read = self._read, len(self._ids)
        found = self._search.find(fresh)
        if found is None:
            self._text += fresh
            return False
        place, self.stopped_by = found
        self._text = (self._text + fresh)[: len(self._text) + place]
        return True

    def text(self, finished: bool) -> str:
        """The text so far; while it goes on, without what may become part of a stop text."""
        if finished:
            if self.stopped_by is not None:
                return self._text
            before = self._decode(self._ids[self._prefix : self._read])
            return self._text + self._decode(self._ids[self._prefix :])[len(before) :]
        return self._text[: len(self._text) - self._search.held]
