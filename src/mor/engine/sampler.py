"""From logits to tokens. Every row is treated alone: batch mates never change a draw."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from mor.engine.constraint import restrict
from mor.engine.mirror import read, to_device, to_int64
from mor.engine.outputs import TokenLogprobs
from mor.engine.params import MAX_LOGPROBS
from mor.engine.request import Request
from mor.ops import native

Likely = TokenLogprobs | None
"""Log-probabilities at a token; None where they were not asked for."""


@dataclass(frozen=True)
class Choice:
    """Tokens that were chosen, still on the device.

    Attributes:
        requests: N, whose they are.
        tokens: [N] ids.
        asked: rows of those that want log-probabilities.
        logs: of these rows, in float64: [a] each token's own, [a, k] the largest, and their ids.
    """

    requests: Sequence[Request]
    tokens: Tensor
    asked: Sequence[int] = ()
    logs: tuple[Tensor, Tensor, Tensor] | None = None

    @property
    def answers(self) -> list[Tensor]:
        """What :meth:`told` has to be given."""
        return [self.tokens, *(self.logs or ())]

    def told(self, tokens: list[int], *logs: list[Any]) -> tuple[list[int], list[Likely]]:
        """Token ids, and log-probabilities for those that asked."""
        found: list[Likely] = [None] * len(tokens)
        for row, own, values, ids in zip(self.asked, *logs, strict=True) if logs else ():
            count = self.requests[row].params.logprobs or 0
            top = dict(zip(map(int, ids[:count]), values[:count], strict=True))
            found[row] = TokenLogprobs(tokens[row], own, top)
        return tokens, found


def sample(logits: Tensor, requests: Sequence[Request]) -> tuple[list[int], list[Likely]]:
    """:func:`choose`, and its answers."""
    choice = choose(logits, requests)
    return choice.told(*read(choice.answers))


def choose(logits: Tensor, requests: Sequence[Request]) -> Choice:
    """Choose one token per row; nothing is asked of the device.

    Order as in Transformers: bias, penalties, then what may not come next, then greedy, or
    temperature, top-k, top-p, min-p and a draw from the request's own random numbers.

    Args:
        logits: [N, V] of the model. requests: whose rows they are.
    """
    if all_greedy(requests):
        return Choice(requests, largest(logits))
    raw = logits.double()  # a temperature near zero must not overflow
    scores = restrict(_shifted(raw, requests), requests)
    tokens = scores.argmax(-1)
    for filtered in (False, True):
        drawn = [
            row
            for row, request in enumerate(requests)
            if not request.params.greedy and filters(request) is filtered
        ]
        if drawn:
            index = to_int64(drawn, logits.device)
            own = [requests[row] for row in drawn]
            tokens[index] = _draw(scores[index], own, filtered)
    asked = [row for row, request in enumerate(requests) if request.params.logprobs is not None]
    return Choice(requests, tokens, asked, _logprobs(raw, tokens, asked))


def largest(logits: Tensor) -> Tensor:
    """[N] which of each row [N, V] is the largest."""
    return native.argmax(logits) if native.fits(logits) else logits.argmax(-1)


def all_plain(requests: Sequence[Request]) -> bool:
    """Whether no bias, penalty, log-probability or restriction is asked for, from now on."""
    return all([len(request.tokens) >= request.plain_at for request in requests])


def all_greedy(requests: Sequence[Request]) -> bool:
    """Whether the largest logits are all that is asked for, from now on."""
    return all([r.params.temperature == 0 and len(r.tokens) >= r.plain_at for r in requests])


def filters(request: Request) -> bool:
    """Whether some tokens may not be drawn, however they score."""
    params = request.params
    return params.top_k > 0 or params.top_p < 1 or params.min_p > 0


def _shifted(raw: Tensor, requests: Sequence[Request]) -> Tensor:
    """Logits with bias and penalties; a copy where there are any."""
    plain = all(not (r.params.logit_bias or r.params.penalised) for r in requests)
    if plain:
        return raw
    scores = raw.clone()
    for row, request in enumerate(requests):
        params = request.params
        if params.logit_bias:
            ids = to_int64(list(params.logit_bias), raw.device)
            scores[row, ids] += _column(list(params.logit_bias.values()), raw)[:, 0]
        if params.repetition_penalty != 1:
            seen = to_int64(sorted(set(request.tokens)), raw.device)
            values = scores[row, seen]
            factor = params.repetition_penalty
            scores[row, seen] = torch.where(values < 0, values * factor, values / factor)
        if request.new_tokens and (params.presence_penalty or params.frequency_penalty):
            made = Counter(request.new_tokens)
            ids, counts = to_int64([list(made), list(made.values())], raw.device).unbind()
            scores[row, ids] -= params.presence_penalty + params.frequency_penalty * counts
    return scores


def _column(values: list[float], like: Tensor) -> Tensor:
    return to_device(np.array(values, dtype=np.float64), like.device)[:, None]


def _draw(scores: Tensor, requests: Sequence[Request], filtered: bool) -> Tensor:
    """Inverse of the cumulative distribution at one uniform number per row."""
    found, order = _chances(scores, requests, filtered)
    uniform = _column([request.draw.random() for request in requests], scores)
    return invert(found, uniform, order)


def chances(logits: Tensor, requests: Sequence[Request]) -> Tensor:
    """What the next tokens of ``requests``, none of them greedy, are drawn from.

    Args:
        logits: [N, V] of the model. requests: whose rows they are.

    Returns:
        [N, V] in float64; each row adds up to 1.
    """
    scores = restrict(_shifted(logits.double(), requests), requests)
    found, order = _chances(scores, requests, any(map(filters, requests)))
    if order is not None:
        found = torch.zeros_like(found).scatter(1, order, found)
    return found / found.sum(-1, keepdim=True)


def draw_from(found: Tensor, uniform: float) -> int:
    """The token at ``uniform``, of 0 to 1, of a distribution [1, V]."""
    return int(_invert(found, _column([uniform], found)))


def tell(logits: Tensor, request: Request, token: int) -> Likely:
    """Log-probabilities of a token under logits [1, V], where they are asked for."""
    tokens = to_int64([token], logits.device)
    asked = [0] if request.params.logprobs is not None else []
    choice = Choice([request], tokens, asked, _logprobs(logits.double(), tokens, asked))
    return choice.told(*read(choice.answers))[1][0]


def _chances(
    scores: Tensor, requests: Sequence[Request], filtered: bool
) -> tuple[Tensor, Tensor | None]:
    """Chances [N, V] up to a factor, and the tokens that they belong to where they are sorted."""
    params = [request.params for request in requests]
    vocabulary = scores.shape[1]
    return filter_chances(
        scores,
        _column([p.temperature for p in params], scores),
        Filters(
            _column([p.top_k or vocabulary for p in params], scores),
            _column([p.top_p for p in params], scores),
            _column([p.min_p for p in params], scores),
        )
        if filtered
        else None,
    )


class Filters(NamedTuple):
    """Which tokens may be drawn at all; each is [N, 1] in float64.

    Attributes:
        top_k: so many of the most likely; the vocabulary for all.
        top_p, min_p: see :class:`mor.engine.SamplingParams`.
    """

    top_k: Tensor
    top_p: Tensor
    min_p: Tensor


def filter_chances(
    scores: Tensor, temperature: Tensor, filters: Filters | None
) -> tuple[Tensor, Tensor | None]:
    """Chances [N, V] of scores [N, V], up to a factor; and whose they are where they are sorted."""
    found = ((scores - scores.amax(-1, keepdim=True)) / temperature).softmax(-1)
    if filters is None:
        return found, None
    found, order = found.sort(dim=-1, descending=True, stable=True)
    places = torch.arange(found.shape[1], device=scores.device)
    found = found.masked_fill(places >= filters.top_k, 0.0)
    # top-p counts among what top-k left; a token stays if those before it do not reach p.
    # (Threads share the plain sum of one long row, but not those of several: other bits.)
    found = found / found.cumsum(-1)[:, -1:]
    before = found.cumsum(-1) - found
    # 1 means all: sums of probabilities may come to a little more.
    found = found.masked_fill((before >= filters.top_p) & (filters.top_p < 1), 0.0)
    floor = filters.min_p * found[:, :1]
    return found.masked_fill(found < floor, 0.0), order


def invert(found: Tensor, uniform: Tensor, order: Tensor | None) -> Tensor:
    """[N] the token where the cumulative sum of chances [N, V] passes ``uniform`` [N, 1]."""
    place = _invert(found, uniform)
    return (place if order is None else order.gather(1, place))[:, 0]


def _invert(found: Tensor, uniform: Tensor) -> Tensor:
    """[N, 1] the place where the cumulative sum of chances [N, V] passes ``uniform`` [N, 1]."""
    reached = found.cumsum(-1)
    place = torch.searchsorted(reached, uniform * reached[:, -1:], right=True)
    # Rounding may lead past the last token with a chance, never to one without.
    last = found.shape[1] - 1 - (found.flip(-1) > 0).to(torch.uint8).argmax(-1, keepdim=True)
    return torch.minimum(place, last)


def _logprobs(
    raw: Tensor, tokens: Tensor, asked: Sequence[int]
) -> tuple[Tensor, Tensor, Tensor] | None:
    """The model's own log-probabilities, before bias, penalties and temperature."""
    if not asked:
        return None
    index = to_int64(asked, raw.device)
    logs = raw[index].log_softmax(-1)
    # Always as many: among equals, how many are asked for may decide which come.
    best = logs.topk(min(MAX_LOGPROBS, logs.shape[1]))
    return logs.gather(1, tokens[index][:, None])[:, 0], best.values, best.indices
