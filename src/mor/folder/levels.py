"""Boundaries for many capacities of one model, so that each request can choose its own.

A level is a factor on the capacities that the model was trained with. Its boundaries come from the
same calibration as those of ``mor calibrate``. Between two levels boundaries are interpolated; how
many tokens then really go on is measured nowhere but in the answer's depths.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from mor.disk import write_whole
from mor.errors import MorError
from mor.run_files import beside_model

FILE = "capacity_levels.json"


@dataclass(frozen=True)
class Level:
    """One calibrated capacity.

    Attributes:
        capacity: factor on the trained capacities.
        capacities: share of tokens at each depth.
        boundaries: logits, one per depth.
    """

    capacity: float
    capacities: tuple[float, ...]
    boundaries: tuple[float, ...]


@dataclass(frozen=True)
class Levels:
    """Levels in ascending order."""

    levels: tuple[Level, ...]

    def __post_init__(self) -> None:
        """Check what a file may hold.

        Raises:
            MorError: fewer than two levels, not ascending, or of unequal depths.
        """
        factors = [level.capacity for level in self.levels]
        if len(factors) < 2 or factors != sorted(set(factors)):
            raise MorError(f"levels={factors} must be two or more capacities, ascending")
        if len({len(level.boundaries) for level in self.levels}) != 1:
            raise MorError("levels have boundaries for unequal numbers of depths")

    @property
    def lowest(self) -> float:
        """The smallest capacity factor."""
        return self.levels[0].capacity

    @property
    def highest(self) -> float:
        """The largest capacity factor."""
        return self.levels[-1].capacity

    def check_depths(self, recursions: int) -> None:
        """Refuse levels for another number of recursions.

        Raises:
            MorError: they belong to another model.
        """
        if len(self.levels[0].boundaries) != recursions:
            raise MorError("levels belong to another model: the number of recursions differs")

    def boundaries(self, capacity: float) -> tuple[float, ...]:
        """Boundaries for a factor, linear between the two levels beside it.

        Raises:
            MorError: outside the levels.
        """
        if not self.lowest <= capacity <= self.highest:
            raise MorError(f"capacity={capacity!r} must lie in {self.lowest:g}..{self.highest:g}")
        above = next(i for i, level in enumerate(self.levels) if i and capacity <= level.capacity)
        low, high = self.levels[above - 1], self.levels[above]
        share = (capacity - low.capacity) / (high.capacity - low.capacity)
        pairs = zip(low.boundaries, high.boundaries, strict=True)
        return tuple((1 - share) * a + share * b for a, b in pairs)

    def save(self, folder: Path) -> None:
        """Write ``capacity_levels.json`` beside the model."""
        text = json.dumps([asdict(level) for level in self.levels], indent=2)
        write_whole(folder / FILE, text + "\n")


def load_levels(folder: Path) -> Levels | None:
    """The levels beside a model; ``folder`` may be a run folder. None where there are none.

    Raises:
        MorError: the file is damaged.
    """
    path = beside_model(folder, FILE)
    if path is None:
        return None
    try:
        content = json.loads(path.read_text("utf-8"))
        return Levels(
            tuple(
                Level(
                    float(one["capacity"]),
                    tuple(map(float, one["capacities"])),
                    tuple(map(float, one["boundaries"])),
                )
                for one in content
            )
        )
    except OSError as error:
        raise MorError(f"{path} cannot be read: {error.strerror or error}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise MorError(f"{path} is damaged: {error}; calibrate again") from None
