"""Log-probabilities as each path of the API shows them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mor.engine import TokenLogprobs
from mor.server.tokens import Tokens

LOWEST = -9999.0  # JSON has no minus infinity


def completion_logprobs(
    likely: Sequence[TokenLogprobs | None],
    offsets: Sequence[int],
    tokens: Tokens,
    first_token: int | None = None,
) -> dict[str, Any]:
    """Log-probabilities in the form of /v1/completions.

    Args:
        likely: one per token; None for the first of a prompt, which nothing comes before.
        offsets: where in the text each begins.
        tokens: for names.
        first_token: the id of that first one.
    """
    ids = [first_token if one is None else one.token for one in likely]
    return {
        "tokens": [tokens.piece(token)[0] for token in ids if token is not None],
        "token_logprobs": [None if one is None else max(one.logprob, LOWEST) for one in likely],
        "top_logprobs": [None if one is None else top_by_name(one, tokens) for one in likely],
        "text_offset": list(offsets),
    }


def top_by_name(one: TokenLogprobs, tokens: Tokens) -> dict[str, float]:
    """The likeliest tokens and the token itself, each once.

    Where another token is spelled like one before, it goes by its number.
    """
    own = tokens.piece(one.token)[0]
    shown: dict[str, float] = {}
    for token, value in (one.top | {one.token: one.logprob}).items():
        name = tokens.piece(token)[0]
        if token != one.token and (name == own or name in shown):
            name = f"token_id:{token}"
        shown[name] = max(value, LOWEST)
    return shown


def prompt_logprobs(
    likely: Sequence[TokenLogprobs | None], count: int, tokens: Tokens
) -> list[dict[str, Any] | None]:
    """Log-probabilities of a prompt in vLLM's form: by token id, the token's own first."""

    def show(token: int, value: float, rank: int | None) -> dict[str, Any]:
        name = tokens.piece(token)[0]
        return {"logprob": max(value, LOWEST), "rank": rank, "decoded_token": name}

    told: list[dict[str, Any] | None] = []
    for one in likely:
        if one is None:
            told.append(None)
            continue
        entry = {str(one.token): show(one.token, one.logprob, one.rank)}
        for rank, (token, value) in enumerate(list(one.top.items())[:count], 1):
            entry.setdefault(str(token), show(token, value, rank))
        told.append(entry)
    return told


def chat_logprobs(likely: Sequence[TokenLogprobs], tokens: Tokens) -> dict[str, Any]:
    """Log-probabilities in the form of /v1/chat/completions."""

    def show(token: int, value: float) -> dict[str, Any]:
        name, raw = tokens.piece(token)
        return {"token": name, "logprob": max(value, LOWEST), "bytes": list(raw)}

    content = []
    for one in likely:
        top = [show(token, value) for token, value in one.top.items()]
        content.append(show(one.token, one.logprob) | {"top_logprobs": top})
    return {"content": content}


class Offsets:
    """Where in a choice's text each new token begins, as far as whole characters tell.

    Args:
        tokens: the tokenizer.
        start: characters before the first of them.
    """

    def __init__(self, tokens: Tokens, start: int = 0) -> None:
        self._text, self._at = tokens.begin_text(), start

    def of(self, ids: Sequence[int]) -> list[int]:
        """Offsets (characters) of the next tokens."""
        found = []
        for token in ids:
            found.append(self._at)
            self._at += len(self._text.push(token))
        return found


def prompt_offsets(ids: Sequence[int], sent: str, tokens: Tokens) -> list[int]:
    """Where in the prompt as it was ``sent`` each of its tokens begins.

    A token that the model's texts begin with, and that nobody sent, takes no room.
    """
    text = tokens.begin_text(skip_special_tokens=False)
    found, length = [], 0
    for token in ids:
        found.append(length)
        length += len(text.push(token))
    added = max(0, length + len(text.rest()) - len(sent))
    return [min(max(0, place - added), len(sent)) for place in found]
