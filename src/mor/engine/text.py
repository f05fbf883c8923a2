"""Text of tokens as they come."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import PreTrainedTokenizerFast

from mor.engine.stops import StopSearch

_BROKEN = "\ufffd"  # what a tokenizer writes for part of a character
_LONG = 16  # tokens without a whole character; no character has so many


def choose_decode(tokenizer: Any) -> Callable[..., str]:
    """``tokenizer.decode``, or what it comes to where nothing is done around the library's own.

    Every token is decoded twice. Transformers looks at the ids, and for spaces to clean up, in
    several times the time that the decoding itself takes.
    """
    plain = type(tokenizer) is PreTrainedTokenizerFast  # a class of its own may decode otherwise
    if plain and not tokenizer.clean_up_tokenization_spaces:
        decode: Callable[..., str] = tokenizer.backend_tokenizer.decode
        return decode
    return lambda ids, **how: str(tokenizer.decode(ids, **how))


class Decoder:
    """Tokens to text, one by one: each gives the text that it completes.

    A few tokens before the new ones are decoded along, since they decide about spaces and about
    characters of several tokens (as in text-generation-inference).

    Args:
        tokenizer: any with ``decode(ids, skip_special_tokens=...)``.
        skip_special_tokens: leave them out.
    """

    def __init__(self, tokenizer: Any, skip_special_tokens: bool = True) -> None:
        self.decode, self.skip_special_tokens = choose_decode(tokenizer), skip_special_tokens
        self._ids: list[int] = []
        self._prefix = self._read = 0

    def _decode(self, start: int, end: int | None = None) -> str:
        return self.decode(self._ids[start:end], skip_special_tokens=self.skip_special_tokens)

    def push(self, token: int) -> str:
        """Add a token; what the text grows by, which may be nothing yet."""
        self._ids.append(token)
        after = self._decode(self._prefix)
        if not after.endswith(_BROKEN):
            return self._take(after, len(self._ids))
        cut = len(self._ids) - _LONG // 2
        if cut - self._read < _LONG // 2:
            return ""
        # Bytes that are no text at all. What no later token can change is let go: decoding all of
        # them again with each token would take longer and longer.
        settled = self._decode(self._prefix, cut)
        return self._take(settled, cut) if settled + self._decode(cut) == after else ""

    def _take(self, text: str, read: int) -> str:
        fresh = text[len(self._decode(self._prefix, self._read)) :]
        self._prefix, self._read = self._read, read
        return fresh

    def rest(self) -> str:
        """What the tokens since the last whole character come to, if no more follow."""
        return self._decode(self._prefix)[len(self._decode(self._prefix, self._read)) :]


class GrowingText:
    """The text of one completion, which grows token by token and never changes behind.

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
        self._decoder, self._search = Decoder(tokenizer, skip_special), StopSearch(stops)
        self._stops, self.include_stop = stops, include_stop
        self._text = ""
        self.stopped_by: str | None = None

    def push(self, token: int, may_stop: bool = True) -> bool:
        """Add a token; whether a stop text is complete now, where one may end the text already."""
        fresh = self._decoder.push(token)
        found = self._search.find(fresh)
        rest = fresh
        while found is not None and not may_stop:  # it does not count: begin anew behind it
            rest, self._search = rest[found[0] + len(found[1]) :], StopSearch(self._stops)
            found = self._search.find(rest)
        if found is None:
            self._text += fresh
            return False
        place, self.stopped_by = found
        place += len(self.stopped_by) * self.include_stop
        self._text = (self._text + fresh)[: len(self._text) + place]
        return True

    def text(self, finished: bool) -> str:
        """The text so far; while it goes on, without what may become part of a stop text."""
        if finished:
            return self._text if self.stopped_by is not None else self._text + self._decoder.rest()
        return self._text[: len(self._text) - self._search.held]
