"""The incremental search finds what a plain search finds, at a cost that no stop text raises."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from mor.engine.stops import StopSearch, StopText
from mor.engine.text import GrowingText


def plain_search(pieces: Sequence[str], stops: Sequence[str]) -> tuple[str, str | None, list[str]]:
    """The text in the end, what stopped it, and what was shown after each piece."""
    text, shown = "", []
    for piece in pieces:
        text += piece
        found = min(((text.find(stop), stop) for stop in stops if stop in text), default=None)
        if found is not None:
            return text[: found[0]], found[1], shown
        held = max(
            (n for stop in stops for n in range(len(stop)) if n and text.endswith(stop[:n])),
            default=0,
        )
        shown.append(text[: len(text) - held])
    return text, None, shown


class Pieces:
    """A tokenizer whose tokens are these texts."""

    def __init__(self, pieces: Sequence[str]) -> None:
        self.pieces = pieces

    def decode(self, ids: list[int], **_: Any) -> str:
        return "".join(self.pieces[i] for i in ids)


LETTERS = st.text("ab", min_size=1, max_size=8)


@given(st.lists(LETTERS, max_size=12), st.lists(LETTERS, min_size=1, max_size=4))
@example(["aab", "aaab"], ["aaaba", "aabaaab"])
@example(["abc", "abcd"], ["bc", "abcd"])
def test_it_finds_what_a_plain_search_finds(pieces: list[str], stops: list[str]) -> None:
    text, stopped_by, shown = plain_search(pieces, stops)
    growing = GrowingText(Pieces(pieces), tuple(stops))
    told = []
    for token in range(len(pieces)):
        if growing.push(token):
            break
        told.append(growing.text(False))
    assert (growing.text(True), growing.stopped_by, told) == (text, stopped_by, shown)


class Counted(str):
    """A text that counts how often one of its characters is looked at."""

    looked = 0

    def __getitem__(self, place: Any) -> str:
        Counted.looked += 1
        return super().__getitem__(place)


@pytest.mark.parametrize("length", [10, 1000])
@pytest.mark.parametrize("text", ["a" * 20_000, "ab" * 10_000, ("a" * 999 + "c") * 20])
def test_long_stop_texts_cost_no_more_than_short_ones(length: int, text: str) -> None:
    Counted.looked = 0
    stop = StopText(Counted("a" * (length - 1) + "b"))
    assert stop.find(text) is None or length == 10
    assert Counted.looked <= 5 * len(text) + 5 * length


def test_nothing_is_paid_for_stop_texts_that_do_not_come() -> None:
    Counted.looked = 0
    search = StopSearch([Counted(chr(97 + i) * 1000) for i in range(16)])
    assert Counted.looked == 0
    assert search.find("0" * 500) is None
    assert (Counted.looked, search.held) == (16 * 500, 0)
