"""Guesses and their checks: what is said is what would have been said without them.

Greedy tokens, and those drawn with a seed, are sampled again at full depth from the request's own
random numbers, and a guess stands where it is the same token. Where nobody gave a seed, guesses
are refused by chance: Leviathan et al., "Fast Inference from Transformers via Speculative
Decoding" (arXiv 2211.17192), which accepts more of them and has the same distribution.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor

from mor.engine.draft import Draft
from mor.engine.outputs import TokenLogprobs
from mor.engine.request import Request
from mor.engine.sampler import all_greedy, chances, draw_from, largest, sample, tell


def guess(request: Request, logits: Tensor) -> None:
    """Guess the next token of the request's draft.

    Args:
        request: with a draft.
        logits: [1, V] after its last guess.
    """
    assert request.draft is not None
    draft, draw = request.draft, request.draw
    with _supposing(request):
        if _refuses_by_chance(request):
            own = chances(logits, [request])
            draft.chances.append(own[0])
            token = draw_from(own, draw.random())  # whether it is refused is drawn anew
        else:
            token = sample(logits, [request])[0][0]
    draft.tokens.append(token)


class Check:
    """What the whole network says at the places of a draft, to be asked in order.

    Args:
        request: whose; its tokens grow from place to place.
        draft: complete.
        logits: [wanted + 1, V] after its last token and after each guess.
    """

    def __init__(self, request: Request, draft: Draft, logits: Tensor) -> None:
        self.request, self.draft, self.logits = request, draft, logits
        self._largest: list[int] | None = None
        if all_greedy([request]):
            self._largest = largest(logits).tolist()

    def token(self, place: int) -> tuple[int, TokenLogprobs | None]:
        """The token at ``place``, and its log-probabilities where they are asked for.

        Guesses behind it stand as long as it is the guess at this place.
        """
        if self._largest is not None:
            return self._largest[place], None
        row = self.logits[place : place + 1]
        if _refuses_by_chance(self.request):
            token = self._refuse(chances(row, [self.request]), place)
            return token, tell(row, self.request, token)
        tokens, likely = sample(row, [self.request])
        return tokens[0], likely[0]

    def _refuse(self, own: Tensor, place: int) -> int:
        draw = self.request.draw
        if place == self.draft.wanted:
            return draw_from(own, draw.random())
        token, guessed = self.draft.tokens[place], self.draft.chances[place]
        if draw.random() * float(guessed[token]) < float(own[0, token]):
            return token
        rest = (own - guessed).clamp(min=0.0)
        # Equal but for rounding: then there is nothing to refuse.
        return draw_from(rest if float(rest.sum()) > 0 else own, draw.random())


def _refuses_by_chance(request: Request) -> bool:
    return not request.params.greedy and request.params.seed is None


@contextmanager
def _supposing(request: Request) -> Iterator[None]:
    """Meanwhile the guesses of its draft are its own, and its random numbers are those after them.

    Afterwards none of these numbers is used up.
    """
    assert request.draft is not None
    made, own = len(request.tokens), request.draw
    if not request.params.greedy:
        ahead = random.Random()
        ahead.setstate(own.getstate())
        for _ in request.draft.tokens:
            ahead.random()
        request.draw = ahead
    request.tokens += request.draft.tokens
    try:
        yield
    finally:
        del request.tokens[made:]
        request.draw = own
