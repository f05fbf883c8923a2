"""Which tokens an answer may go on with: grammars from outside, words that are not wanted.

The engine knows a grammar only by these protocols; `mor.server.structure` has one that is made by a
library.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mor.engine.mirror import to_device
from mor.engine.request import Request


@runtime_checkable
class Constraint(Protocol):
    """One completion's way through a grammar. It belongs to the engine's thread."""

    def allowed(self) -> NDArray[np.bool_]:
        """[tokens] which may come next, an end of text among them; tokens past its end may not."""

    def take(self, token: int) -> None:
        """Go on by a token."""

    @property
    def finished(self) -> bool:
        """Whether the grammar is at its end and nothing may follow."""

    @property
    def failed(self) -> bool:
        """Whether the grammar cannot go on, through no fault of the model's."""


@runtime_checkable
class Grammar(Protocol):
    """What answers must look like; each completion begins it anew."""

    def begin(self) -> Constraint:
        """The beginning."""


def restricts(request: Request) -> bool:
    """Whether some tokens may not come next."""
    params = request.params
    early = request.made < params.min_tokens
    return request.constraint is not None or early or bool(params.bad_words)


def restrict(scores: Tensor, requests: Sequence[Request]) -> Tensor:
    """Scores with minus infinity where a token may not come next; other rows keep their bits.

    A grammar goes before everything else: where unwanted words and ``min_tokens`` would leave no
    token of it, or none at all, they give way.

    Args:
        scores: [N, V]. requests: whose rows they are.

    Returns:
        A copy, or ``scores`` itself where nothing is restricted.
    """
    rows = [row for row, request in enumerate(requests) if restricts(request)]
    if not rows:
        return scores
    scores = scores.clone()
    for row in rows:
        allowed = to_device(allowed_tokens(requests[row], scores.shape[1]), scores.device)
        scores[row].masked_fill_(~allowed, -torch.inf)
    return scores


def allowed_tokens(request: Request, vocab_size: int) -> NDArray[np.bool_]:
    """[V] which tokens may come next."""
    allowed = np.ones(vocab_size, dtype=bool)
    if request.constraint is not None:
        given = request.constraint.allowed()[:vocab_size]
        allowed[: len(given)], allowed[len(given) :] = given, False
        if not allowed.any():  # it has failed, and the request ends with this token
            allowed[:] = True
    left = allowed.copy()
    left[[token for token in _unwanted(request) if token < vocab_size]] = False
    return left if left.any() else allowed


def _unwanted(request: Request) -> set[int]:
    """Ends that come too early, and the last tokens of words that are not wanted."""
    params, tokens = request.params, request.tokens
    found = set(request.stop_ids) if request.made < params.min_tokens else set()
    for word in params.bad_words:
        head = list(word[:-1])
        if request.made >= len(head) and tokens[len(tokens) - len(head) :] == head:
            found.add(word[-1])
    return found
