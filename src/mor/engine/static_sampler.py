"""The sampler as a stage: what requests ask for lies in columns, and nothing hangs on it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from mor.engine.request import Request
from mor.engine.sampler import (
    Choice,
    Filters,
    all_greedy,
    all_plain,
    filter_chances,
    filters,
    invert,
    largest,
)
from mor.engine.stages import Stage

_NO_DRAW = (0, 1.0, 0.0, 0, 1.0, 0.0)  # whether drawn, temperature, uniform, top-k, top-p, min-p


class StaticSampler:
    """:func:`mor.engine.sampler.choose` over a buffer of logits, for most of what is asked for.

    Log-probabilities, bias, penalties and what may not come next are of sizes of their own: batches
    with them go through the plain form, operator after operator, which does not wait either.

    Args:
        rows: requests at a time.
        vocabulary: V.
        device: of the logits.
    """

    def __init__(self, rows: int, vocabulary: int, device: torch.device) -> None:
        self.rows, self.vocabulary, self.device = rows, vocabulary, device
        self._logits: Tensor | None = None  # made when it is known in what type they come
        idle = [rows, *_bits([_NO_DRAW])[:, 0]]
        self._plain = Stage(lambda columns: self._choose(columns, False), idle, rows, device)
        self._filtered = Stage(lambda columns: self._choose(columns, True), idle, rows, device)

    def __call__(self, logits: Tensor, requests: Sequence[Request]) -> Choice | None:
        """Tokens for logits [N, V]; None where the plain form has to choose."""
        if all_greedy(requests):
            return Choice(requests, largest(logits))
        if len(requests) > self.rows or not all_plain(requests):
            return None
        if self._logits is None:
            self._logits = logits.new_zeros((self.rows + 1, self.vocabulary))
        self._logits[: len(logits)].copy_(logits)
        some = any(not request.params.greedy and filters(request) for request in requests)
        stage = self._filtered if some else self._plain
        asked = _bits([_ask(request, self.vocabulary) for request in requests])
        found = stage([range(len(requests)), *asked])
        return Choice(requests, found.clone())  # read when the next tick has run

    def _choose(self, columns: Tensor, filtered: bool) -> Tensor:
        assert self._logits is not None
        scores = self._logits.index_select(0, columns[0]).double()
        drawn, top_k = columns[1], columns[4]
        temperature, uniform, top_p, min_p = (
            columns[place].view(torch.float64)[:, None] for place in (2, 3, 5, 6)
        )
        tokens = scores.argmax(-1)
        plain = invert(*_with(filter_chances(scores, temperature, None), uniform))
        tokens = torch.where(drawn == 1, plain, tokens)
        if filtered:
            own = filter_chances(
                scores, temperature, Filters(top_k[:, None].double(), top_p, min_p)
            )
            tokens = torch.where(drawn == 2, invert(*_with(own, uniform)), tokens)
        return tokens


def _with(
    chances: tuple[Tensor, Tensor | None], uniform: Tensor
) -> tuple[Tensor, Tensor, Tensor | None]:
    return chances[0], uniform, chances[1]


def _ask(request: Request, vocabulary: int) -> tuple[float, ...]:
    """As :data:`_NO_DRAW`; a row that is drawn takes its next random number."""
    params = request.params
    if params.greedy:
        return _NO_DRAW
    kind, uniform = 1 + filters(request), request.draw.random()
    return kind, params.temperature, uniform, params.top_k or vocabulary, params.top_p, params.min_p


def _bits(asked: Sequence[Sequence[float]]) -> np.ndarray:
    """[6, N] whole numbers: those that are fractions by the bits of float64."""
    columns = np.array(asked, dtype=np.float64).T.copy()
    found = columns.view(np.int64).copy()
    for whole in (0, 3):
        found[whole] = columns[whole].astype(np.int64)
    return found
