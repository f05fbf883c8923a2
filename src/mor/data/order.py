"""The order in which an epoch visits its rows: random, and known without having been stored.

Which row stands at which place is a function of seed, epoch and place alone, so a run that goes on
needs no state but its position, whatever the position is.
"""

from __future__ import annotations

import numpy as np

# Up to here a whole permutation is made at once: perfectly uniform, two megabytes, a few
# milliseconds. Beyond, places are computed in blocks and none of it grows with the data.
SMALL = 2**18
_BLOCK = 2**12
_ROUNDS = 6
_MULTIPLIERS = np.array([0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9], dtype=np.uint64)


class Shuffle:
    """A permutation of `range(length)`, given by seed and epoch."""

    def __init__(self, length: int, seed: int, epoch: int) -> None:
        """Prepare it; costs next to nothing beyond `SMALL`."""
        self.length = length
        self._block = -1
        if length <= SMALL:
            self._places = np.random.default_rng([seed, epoch]).permutation(length)
        else:
            self._keys = np.random.SeedSequence([seed, epoch]).generate_state(_ROUNDS, np.uint64)

    def __getitem__(self, place: int) -> int:
        """What stands at `place`. Neighbouring places are computed together and remembered."""
        if self.length <= SMALL:
            return int(self._places[place])
        block, inside = divmod(place, _BLOCK)
        if block != self._block:
            first = block * _BLOCK
            places = np.arange(first, min(first + _BLOCK, self.length), dtype=np.uint64)
            self._block, self._places = block, feistel(places, self.length, self._keys)
        return int(self._places[inside])


def feistel(places: np.ndarray, length: int, keys: np.ndarray) -> np.ndarray:
    """Where `places` (uint64, each below `length`) go in a pseudo-random permutation.

    A Feistel network over the smallest power of four that holds `length`, with cycle walking: what
    falls outside goes through again until it falls inside, under two times on average and always
    at last, since the network is a permutation (Black & Rogaway 2002,
    https://doi.org/10.1007/3-540-45760-7_9, sections 3 and 4).

    Args:
        places: `[n]`.
        length: of the permutation.
        keys: `[rounds]` uint64, one per round; another set, another permutation.
    """
    half = np.uint64(max(1, ((length - 1).bit_length() + 1) // 2))
    mask = (np.uint64(1) << half) - np.uint64(1)
    result = _rounds(places, half, mask, keys)
    while (outside := np.flatnonzero(result >= length)).size:
        result[outside] = _rounds(result[outside], half, mask, keys)
    return result


def _rounds(values: np.ndarray, half: np.uint64, mask: np.uint64, keys: np.ndarray) -> np.ndarray:
    left, right = values >> half, values & mask
    for key in keys:
        mixed = (right ^ key) * _MULTIPLIERS[0]
        mixed ^= mixed >> np.uint64(31)
        mixed *= _MULTIPLIERS[1]
        mixed ^= mixed >> np.uint64(29)
        left, right = right, left ^ (mixed & mask)
    result: np.ndarray = (left << half) | right
    return result
