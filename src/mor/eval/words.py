"""What a token is in its text: part of speech, place in its word, punctuation.

Parts of speech come from TextBlob's tagger (the lexicon and rules of Pattern), which has its data
in the package. Words are tagged one by one and by their neighbours; about one in twenty is wrong.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec

# Letters with what English hangs on by an apostrophe as a piece of its own, numbers, marks.
_PIECE = re.compile(
    r"(?P<clitic>['’](?:s|ll|re|d|ve|m|t)\b)|(?P<word>[^\W\d_]+)|(?P<number>\d[\d.,]*)|(?P<mark>[^\s])",
    re.IGNORECASE,
)
# Beginnings of Penn tags, the longest first.
_TAGS = (
    ("NNP", "proper noun"), ("NN", "noun"), ("VB", "verb"), ("MD", "verb"), ("JJ", "adjective"),
    ("WRB", "adverb"), ("RB", "adverb"), ("PRP", "pronoun"), ("WP", "pronoun"), ("EX", "pronoun"),
    ("DT", "determiner"), ("PDT", "determiner"), ("WDT", "determiner"), ("IN", "preposition"),
    ("TO", "preposition"), ("CC", "conjunction"), ("CD", "number"), ("RP", "particle"),
    ("UH", "interjection"), ("POS", "clitic"),
)  # fmt: skip
PUNCTUATION, SPACE, NUMBER = "punctuation", "space", "number"


@dataclass(frozen=True)
class Place:
    """What one token is.

    Attributes:
        part: of its word: `whole word`, `first part`, `inside`, `last part`; or `punctuation`,
            `space`.
        speech: part of speech of its word, `punctuation`, `space`; None without a tagger.
    """

    part: str
    speech: str | None


def can_tag() -> bool:
    """Whether the tagger is installed."""
    return find_spec("textblob") is not None


def tag_words(words: Sequence[str]) -> list[str]:
    """Parts of speech of the words of a text, punctuation among them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # it leaves its lexicon's file open
        return _tag(words)


def _tag(words: Sequence[str]) -> list[str]:
    from textblob.en import tag

    # A slash and a space would be taken for the tagger's own marks.
    clean = [re.sub(r"[\s/]", "-", word) for word in words]
    tagged = tag(" ".join(clean), tokenize=False)
    if len(tagged) != len(clean):  # it has split a word after all
        tagged = [pair for word in clean for pair in tag(word, tokenize=False)[:1] or [(word, "")]]
    return [_name(label) for _, label in tagged]


def _name(tag: str) -> str:
    return next((name for start, name in _TAGS if tag.startswith(start)), "other")


def place_tokens(texts: Sequence[str]) -> list[Place]:
    """What each token of a text is.

    Args:
        texts: of the tokens, so that together they are the text
            (:func:`mor.eval.evaluate.token_texts`); an empty one belongs to the next character.
    """
    text = "".join(texts)
    pieces = list(_PIECE.finditer(text))
    speech: list[str | None] = [None] * len(pieces)
    if can_tag() and pieces:
        tags = tag_words([piece[0] for piece in pieces])
        speech = [
            {"mark": PUNCTUATION, "number": NUMBER}.get(str(piece.lastgroup), tag)
            for piece, tag in zip(pieces, tags, strict=True)
        ]
    found, begin, at = [], 0, 0
    for token in texts:
        end = begin + len(token)
        first = begin + len(token) - len(token.lstrip())
        while at < len(pieces) and pieces[at].end() <= first:
            at += 1
        last = begin + len(token.rstrip())
        if token and first >= end:
            found.append(Place(SPACE, SPACE if can_tag() else None))
        elif at == len(pieces):
            found.append(Place("inside", None))
        else:
            piece = pieces[at]
            found.append(Place(_part(piece, first, last), speech[at]))
        begin = end
    return found


def _part(piece: re.Match[str], first: int, last: int) -> str:
    if piece.lastgroup == "mark":
        return PUNCTUATION
    starts, ends = first <= piece.start(), last >= piece.end()
    return {
        (True, True): "whole word",
        (True, False): "first part",
        (False, True): "last part",
        (False, False): "inside",
    }[starts, ends]
