"""What tokens are: place in the word, part of speech."""

from __future__ import annotations

import pytest

from mor.eval import words
from mor.eval.words import place_tokens, tag_words


def test_places_in_words() -> None:
    tokens = [
        "The",
        " k",
        "in",
        "g",
        "'s",
        ",",
        " ",
        "\n",
        "cr",
        "own",
        " 42",
        ".5",
        " (",
        "a",
        ").",
    ]
    parts = [place.part for place in place_tokens(tokens)]
    assert parts == [
        "whole word", "first part", "inside", "last part", "whole word", "punctuation", "space",
        "space", "first part", "last part", "first part", "last part", "punctuation",
        "whole word", "punctuation",
    ]  # fmt: skip


def test_texts_that_are_hardly_texts() -> None:
    assert place_tokens([]) == []
    assert [p.part for p in place_tokens([" ", "\n\n"])] == ["space", "space"]
    # Bytes of one character in several tokens: the text comes with the last of them.
    assert [p.part for p in place_tokens(["caf", "", "é", "!"])] == [
        "first part", "inside", "last part", "punctuation",
    ]  # fmt: skip
    assert [p.part for p in place_tokens(["", ""])] == ["inside", "inside"]
    assert len(place_tokens(["…", "\x00", "//", " a/b "])) == 4


def test_without_a_tagger(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(words, "can_tag", lambda: False)
    assert {place.speech for place in place_tokens(["the", " king", ".", " "])} == {None}


def test_parts_of_speech() -> None:
    pytest.importorskip("textblob")
    tokens = ["The", " k", "ing", "'s", " men", " slowly", " gave", " her", " 3", " apples", "."]
    assert [place.speech for place in place_tokens(tokens)] == [
        "determiner", "noun", "noun", "clitic", "noun", "adverb", "verb", "pronoun", "number",
        "noun", "punctuation",
    ]  # fmt: skip
    odd = ["&", "and/or", "a b", "&slash;", "<", "/"]
    assert len(tag_words(odd)) == len(odd)
