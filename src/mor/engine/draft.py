"""Tokens that were guessed at a low depth, for the whole network to check."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor


@dataclass(eq=False)
class Draft:
    """What a request guesses that it will say next.

    Attributes:
        wanted: how many tokens are guessed before they are checked.
        depth: recursions that a guess may take.
        lengths: entries in each of the request's table rows before the first guess.
        tokens: guessed so far.
        chances: what each of them was drawn from, [V] in float64, where it may be refused by chance
            (rejection sampling); else empty.
    """

    wanted: int
    depth: int
    lengths: tuple[int, ...]
    tokens: list[int] = field(default_factory=list)
    chances: list[Tensor] = field(default_factory=list)

    @property
    def complete(self) -> bool:
        """Whether there is nothing more to guess."""
        return len(self.tokens) == self.wanted
