"""From logits to tokens. Every row is treated alone: batch mates never change a draw."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mor.engine.constraint import restrict, restricts
from mor.engine.outputs import TokenLogprobs
from mor.engine.request import Request
from mor.ops import native


def sample(logits: Tensor, requests: Sequence[Request]) -> tuple[list[int], list[TokenLogprobs]]:
    """Choose one token per row.

    Order as in Transformers: bias, penalties, then what may not come next, then greedy, or
    temperature, top-k, top-p, min-p and a draw from the request's own random numbers.

    Args:
        logits: [N, V] of the model. requests: whose rows they are.

    Returns:
        Token ids; log-probabilities for those that asked (with no ``top`` and 0.0 for the others).
    """
    if all(_plainly_greedy(request) for request in requests):
        chosen = (native.argmax(logits) if native.fits(logits) else logits.argmax(-1)).tolist()
        return chosen, [TokenLogprobs(token, 0.0, {}) for token in chosen]
    raw = logits.double()  # a temperature near zero must not overflow
    scores = restrict(_shifted(raw, requests), requests)
    tokens = scores.argmax(-1)
    for filtered in (False, True):
        drawn = [
            row
            for row, request in enumerate(requests)
            if not request.params.greedy and _filters(request) is filtered
        ]
        if drawn:
            index = torch.tensor(drawn, device=logits.device)
            own = [requests[row] for row in drawn]
            tokens[index] = _draw(scores[index], own, filtered)
    chosen = tokens.tolist()
    return chosen, _logprobs(raw, chosen, requests)


def _plainly_greedy(request: Request) -> bool:
    """Whether the largest logit is all that is asked for."""
    params = request.params
    looked_at = params.logprobs is not None or params.logit_bias or params.penalised
    return params.greedy and not looked_at and not restricts(request)


def _filters(request: Request) -> bool:
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
            ids = torch.tensor(list(params.logit_bias), device=raw.device)
            bias = torch.tensor(
                list(params.logit_bias.values()), dtype=raw.dtype, device=raw.device
            )
            scores[row, ids] += bias
        if params.repetition_penalty != 1:
            seen = torch.tensor(sorted(set(request.tokens)), device=raw.device)
            values = scores[row, seen]
            factor = params.repetition_penalty
            scores[row, seen] = torch.where(values < 0, values * factor, values / factor)
        if request.new_tokens and (params.presence_penalty or params.frequency_penalty):
            made = torch.tensor(request.new_tokens, device=raw.device)
            ids, counts = made.unique(return_counts=True)
            scores[row, ids] -= params.presence_penalty + params.frequency_penalty * counts
    return scores


def _column(values: list[float], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=like.dtype, device=like.device)[:, None]


def _draw(scores: Tensor, requests: Sequence[Request], filtered: bool) -> Tensor:
    """Inverse of the cumulative distribution at one uniform number per row."""
    params = [request.params for request in requests]
    temperature = _column([p.temperature for p in params], scores)
    chances = ((scores - scores.amax(-1, keepdim=True)) / temperature).softmax(-1)
    order = None
    if filtered:
        chances, order = chances.sort(dim=-1, descending=True, stable=True)
        vocabulary = chances.shape[1]
        top_k = _column([p.top_k or vocabulary for p in params], scores)
        chances = chances.masked_fill(torch.arange(vocabulary, device=scores.device) >= top_k, 0.0)
        # top-p counts among what top-k left; a token stays if those before it do not reach p.
        # (Threads share the plain sum of one long row, but not those of several: other bits.)
        chances = chances / chances.cumsum(-1)[:, -1:]
        before = chances.cumsum(-1) - chances
        top_p = _column([p.top_p for p in params], scores)
        # 1 means all: sums of probabilities may come to a little more.
        chances = chances.masked_fill((before >= top_p) & (top_p < 1), 0.0)
        floor = _column([p.min_p for p in params], scores) * chances[:, :1]
        chances = chances.masked_fill(chances < floor, 0.0)
    reached = chances.cumsum(-1)
    uniform = _column([request.draw.random() for request in requests], scores)
    place = torch.searchsorted(reached, uniform * reached[:, -1:], right=True)
    # Rounding may lead past the last token with a chance, never to one without.
    last = chances.shape[1] - 1 - (chances.flip(-1) > 0).to(torch.uint8).argmax(-1, keepdim=True)
    place = torch.minimum(place, last)
    return (place if order is None else order.gather(1, place))[:, 0]


def _logprobs(raw: Tensor, tokens: list[int], requests: Sequence[Request]) -> list[TokenLogprobs]:
    """The model's own log-probabilities, before bias, penalties and temperature."""
    asked = [row for row, request in enumerate(requests) if request.params.logprobs is not None]
    found = [TokenLogprobs(token, 0.0, {}) for token in tokens]
    if not asked:
        return found
    logs = raw[torch.tensor(asked, device=raw.device)].log_softmax(-1)
    for own, row in zip(logs, asked, strict=True):
        best = own.topk(min(requests[row].params.logprobs or 0, len(own)))
        top = dict(zip(best.indices.tolist(), best.values.tolist(), strict=True))
        found[row] = TokenLogprobs(tokens[row], float(own[tokens[row]]), top)
    return found
