"""Whether a text is too long, found without making tokens of all of it."""

from __future__ import annotations

from typing import Any

PIECE = 16_384  # characters that are encoded at a time: some 20 ms
SLACK = 64  # tokens that a piece may have more than its part of the whole, for what was cut in two


def is_too_long(text: str, tokenizer: Any, most: int) -> bool:
    """Whether ``text`` certainly has more than ``most`` tokens.

    It is encoded piece by piece, and no further than until that is known. Words that a cut goes
    through may have more tokens than whole, so some are not counted: a text of up to ``PIECE``
    characters, or one that is too long by few tokens, is not refused here but once it is encoded.

    Args:
        text: a prompt.
        tokenizer: of the model.
        most: tokens that fit.
    """
    if len(text) <= PIECE:
        return False
    counted = start = 0
    while start < len(text):
        end = start + PIECE
        blank = text.rfind(" ", end - SLACK, end) if end < len(text) else -1
        end = blank if blank > start else end  # before a blank, where words begin
        piece = text[start:end]
        counted += max(0, len(tokenizer(piece, add_special_tokens=False).input_ids) - SLACK)
        if counted > most:
            return True
        start = end
    return False
