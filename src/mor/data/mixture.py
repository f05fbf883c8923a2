"""Interleaving several sources of samples by weight, exactly and without randomness in the counts.

Of the first n samples, source c gives n times its share, up or down less than one, for every n:
Tijdeman's solution of the chairman assignment problem (1980, Discrete Mathematics 32, 323-330,
https://doi.org/10.1016/0012-365X(80)90269-1). Shares are fractions, so the sequence repeats after
their common denominator; one period is kept, and any place in it is found at once.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from fractions import Fraction

from mor.errors import MorError

# Shares whose common denominator is larger are rounded to this many parts: a relative error of
# at most 1 / 65,536 of a share.
MAX_PERIOD = 2**16


class Interleaving:
    """Says for each sample of a mixture which source it is from, and which of its samples.

    Attributes:
        period: samples after which the sequence of sources repeats.
        counts: samples of each source in one period; `counts[c] / period` is its share.
    """

    def __init__(self, weights: Sequence[float], seed: int = 0) -> None:
        """Make one period.

        Args:
            weights: one per source, above 0, of any sum; 0.7 and 0.3, or 7 and 3.
            seed: decides between sources that are due equally soon.

        Raises:
            MorError: there is no weight, or one is not above 0.
        """
        if not weights or any(not w > 0 or math.isinf(w) for w in weights):
            raise MorError(f"weights are {list(weights)}, expected numbers above 0, one per source")
        self.counts = _counts(weights)
        self.period = sum(self.counts)
        ties = list(range(len(weights)))
        random.Random(seed).shuffle(ties)
        self._sources, self._ranks = _sequence(self.counts, ties)

    def at(self, sample: int) -> tuple[int, int]:
        """The source of `sample` (0-based), and the number of that source's samples before it."""
        turn, place = divmod(sample, self.period)
        source = self._sources[place]
        return source, turn * self.counts[source] + self._ranks[place]

    def first(self, source: int, number: int) -> int:
        """Which sample of the mixture is sample `number` of `source`: the inverse of `at`."""
        turn, rank = divmod(number, self.counts[source])
        places = (i for i, c in enumerate(self._sources) if c == source and self._ranks[i] == rank)
        return turn * self.period + next(places)


def _counts(weights: Sequence[float]) -> list[int]:
    """Samples of each source in one period: whole numbers with the ratios of `weights`."""
    exact = [Fraction(str(weight)) for weight in weights]
    shares = [weight / sum(exact) for weight in exact]
    period = math.lcm(*(share.denominator for share in shares))
    if period <= MAX_PERIOD:
        return [int(share * period) for share in shares]
    counts = [max(1, math.floor(share * MAX_PERIOD)) for share in shares]
    remainders = sorted(range(len(shares)), key=lambda c: counts[c] - shares[c] * MAX_PERIOD)
    for c in remainders[: max(0, MAX_PERIOD - sum(counts))]:
        counts[c] += 1
    return counts


def _sequence(counts: list[int], ties: list[int]) -> tuple[list[int], list[int]]:
    """The source of each sample of one period, and its rank among that source's samples."""
    period, given = sum(counts), [0] * len(counts)
    sources, ranks = [], []
    slack = max(1, 2 * len(counts) - 2)
    for number in range(1, period + 1):
        # All in units of 1 / (slack x period) of a sample. A source may be next once it lags
        # 1 / slack behind its share; of those, the one that would first lag too far is.
        best, soonest = -1, (math.inf, 0)
        for c, count in enumerate(counts):
            lag = (count * number - given[c] * period) * slack
            if lag >= period:
                due = ((slack - 1) * period - lag) / count
                if (due, ties[c]) < soonest:
                    best, soonest = c, (due, ties[c])
        sources.append(best)
        ranks.append(given[best])
        given[best] += 1
    return sources, ranks
