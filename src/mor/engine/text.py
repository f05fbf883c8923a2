"""Text of tokens as they come, and the search for stop texts in it."""

from __future__ import annotations

from typing import Any

_BROKEN = "\ufffd"  # what a tokenizer writes for part of a character


class GrowingText:
    """The text of one completion, which grows token by token and never changes behind.

    A few tokens before the new ones are decoded along, since they decide about spaces and about
    characters of several tokens (as in text-generation-inference).

    Args:
        tokenizer: any with ``decode(ids, skip_special_tokens=...)``.
        stops: texts that end the completion.
        skip_special: leave special tokens out.
        include_stop: the text ends behind the stop text, not before it.
    """

    def __init__(
        self,
        tokenizer: Any,
        stops: tuple[str, ...],
        *,
        skip_special: bool = True,
        include_stop: bool = False,
    ) -> None:
        self.tokenizer, self.stops = tokenizer, stops
        self.skip_special, self.include_stop = skip_special, include_stop
        self._ids: list[int] = []
        self._prefix = self._read = 0
        self._text = ""
        self._hold = max((len(stop) for stop in stops), default=1) - 1
        self.stopped_by: str | None = None

    def _decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=self.skip_special)

    def push(self, token: int, may_stop: bool = True) -> bool:
        """Add a token; whether a stop text is complete now, where one may end the text already."""
        self._ids.append(token)
        before = self._decode(self._ids[self._prefix : self._read])
        after = self._decode(self._ids[self._prefix :])
        if after.endswith(_BROKEN):
            return False
        fresh = after[len(before) :]
        self._prefix, self._read = self._read, len(self._ids)
        searched = max(0, len(self._text) - self._hold)
        self._text += fresh
        found = [(self._text.find(stop, searched), stop) for stop in self.stops]
        found = [(place, stop) for place, stop in found if place >= 0]
        if not found or not may_stop:
            return False
        place, self.stopped_by = min(found)
        self._text = self._text[: place + len(self.stopped_by) * self.include_stop]
        return True

    def text(self, finished: bool) -> str:
        """The text so far; while it goes on, without what may become part of a stop text."""
        if finished:
            if self.stopped_by is not None:
                return self._text
            before = self._decode(self._ids[self._prefix : self._read])
            return self._text + self._decode(self._ids[self._prefix :])[len(before) :]
        for length in range(min(self._hold, len(self._text)), 0, -1):
            if any(stop.startswith(self._text[-length:]) for stop in self.stops):
                return self._text[:-length]
        return self._text
