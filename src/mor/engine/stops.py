"""The search for stop texts in a text that grows: every character is looked at once."""

from __future__ import annotations

from collections.abc import Sequence


class StopText:
    """One stop text, and how much of it the text so far ends with.

    Knuth, Morris and Pratt (1977), with their table made as far as the search has come. So a
    character costs a few comparisons on average, however long the stop text is, and nothing is
    paid for it before.

    Attributes:
        text: what is searched for.
        matched: characters of it that the text so far ends with.
    """

    def __init__(self, text: str) -> None:
        self.text, self.matched = text, 0
        # By length of a match: of the longest shorter match that it ends with.
        self._shorter = [0, 0]

    def _extend_table(self, length: int) -> None:
        table, text = self._shorter, self.text
        while len(table) <= length:
            last, shorter = text[len(table) - 1], table[-1]
            while shorter and text[shorter] != last:
                shorter = table[shorter]
            table.append(shorter + (text[shorter] == last))

    def find(self, fresh: str) -> int | None:
        """Go on with ``fresh``, the characters that follow.

        Returns:
            Where in ``fresh`` the first occurrence ends; None where there is none yet. After one
            the search is over.
        """
        text, matched = self.text, self.matched
        for place, letter in enumerate(fresh):
            while matched and text[matched] != letter:
                self._extend_table(matched)
                matched = self._shorter[matched]
            if text[matched] == letter:
                matched += 1
                if matched == len(text):
                    return place + 1
        self.matched = matched
        return None


class StopSearch:
    """Several stop texts at once.

    Args:
        stops: none of them empty.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = [StopText(stop) for stop in stops]

    def find(self, fresh: str) -> tuple[int, str] | None:
        """Go on with ``fresh``.

        Returns:
            Of the stop texts that are complete now, the one that begins first: where, counted from
            the beginning of ``fresh`` (below 0: before it), and the text itself.
        """
        found = []
        for stop in self._stops:
            end = stop.find(fresh)
            if end is not None:
                found.append((end - len(stop.text), stop.text))
        return min(found, default=None)

    @property
    def held(self) -> int:
        """Characters at the end of the text that may be the beginning of a stop text."""
        return max((stop.matched for stop in self._stops), default=0)
