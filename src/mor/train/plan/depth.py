"""The depth schedule: which cap on recursions each optimiser step trains under."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mor.train.recipe.depth import DepthParts
from mor.train.recipe.sections import TrainSection


@dataclass(frozen=True)
class DepthSchedule:
    """A depth cap for every optimiser step: a function of the step, so that resuming needs no more.

    Attributes:
        parts: shares of the run with their caps, in order; or ``random``, a cap of 1 to R for each
            step, drawn evenly.
        recursions: R of the model.
        seed: of the random caps; every rank draws the same.
    """

    parts: DepthParts
    recursions: int
    seed: int = 0

    def caps(self, steps: int) -> np.ndarray:
        """The cap of each step of a run of ``steps``, int64 [steps]."""
        if self.parts == "random":
            return 1 + _hash(np.arange(steps, dtype=np.uint64), self.seed) % self.recursions
        shares, caps = zip(*self.parts, strict=True)
        ends = np.rint(np.cumsum(shares) * steps).astype(np.int64)
        return np.repeat(np.array(caps, np.int64), np.diff(ends, prepend=0))


def depth_schedule_of(section: TrainSection, recursions: int) -> DepthSchedule | None:
    """The schedule that the recipe asks for; None where every step may use all recursions."""
    if section.depth_schedule is None:
        return None
    return DepthSchedule(section.depth_schedule, recursions, section.seed)


def first_difference(
    one: TrainSection, steps: int, other: TrainSection, other_steps: int, until: int
) -> int | None:
    """The first step before ``until`` at which two runs train under different caps; None if none.

    Random caps do not depend on the length of a run, so they never differ.
    """
    found = []
    for section, length in ((one, steps), (other, other_steps)):
        schedule = depth_schedule_of(section, 1)  # with random caps all alike
        caps = np.zeros(length, np.int64) if schedule is None else schedule.caps(length)
        found.append(caps[:until])
    differ = np.flatnonzero(found[0] != found[1])
    return int(differ[0]) if differ.size else None


def _hash(steps: np.ndarray, seed: int) -> np.ndarray:
    """Evenly spread numbers of 31 bits for uint64 [n] (SplitMix64), int64 [n]."""
    with np.errstate(over="ignore"):
        mixed = steps + np.uint64(seed) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(1)
        mixed = mixed * np.uint64(0x9E3779B97F4A7C15)
        mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return ((mixed ^ (mixed >> np.uint64(31))) >> np.uint64(33)).astype(np.int64)
