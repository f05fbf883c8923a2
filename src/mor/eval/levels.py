"""Boundaries for many capacities of one model, so that each request can choose its own.

A level is a factor on the capacities that the model was trained with. Its boundaries come from the
same calibration as those of ``mor calibrate``. Between two levels boundaries are interpolated; how
many tokens then really go on is measured nowhere but in the answer's depths.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch.utils.data import Dataset

from mor.disk import write_whole
from mor.errors import MorError
from mor.eval.calibrate import Known, calibrate
from mor.eval.passes import Tick
from mor.hf.modeling import MoRForCausalLM
from mor.model.routers import BoundaryRouter
from mor.run_files import beside_model

FILE = "capacity_levels.json"
FACTORS = (0.1, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5)
FULLEST = 0.98  # share of tokens; a boundary below all of them is no quantile of any sample


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


def calibrate_levels(
    model: MoRForCausalLM,
    dataset: Dataset,
    *,
    factors: Sequence[float] = FACTORS,
    max_sequences: int = 64,
    batch_size: int = 8,
    tick: Tick = lambda: None,
) -> Levels:
    """Calibrate at several capacities; the model is left as it was.

    A depth of capacity 1 keeps it at every level: such depths have no boundary. ``tick`` is called
    after each batch, at every level as often as :func:`~mor.eval.calibrate.count_ticks` says.

    Raises:
        MorError: as :func:`~mor.eval.calibrate.calibrate`, and for factors that are not positive.
    """
    router, config = model.model.router, model.config
    if any(not factor > 0 for factor in factors):
        raise MorError(f"factors={list(factors)} must all be above 0")
    before = list(config.router_capacities), config.router_decision_rule
    kept = (
        (router.boundary.clone(), router.boundary_steps.clone())
        if isinstance(router, BoundaryRouter)
        else None
    )
    levels, known = [], Known()
    try:
        for factor in sorted(factors):
            wanted = [c if c >= 1 else min(FULLEST, c * factor) for c in before[0]]
            boundaries = calibrate(
                model,
                dataset,
                max_sequences=max_sequences,
                batch_size=batch_size,
                capacities=wanted,
                tick=tick,
                known=known,
            )
            levels.append(Level(factor, tuple(wanted), tuple(boundaries)))
    finally:
        config.router_capacities, config.router_decision_rule = before
        if kept is not None and isinstance(router, BoundaryRouter):
            with torch.no_grad():
                router.boundary.copy_(kept[0])
                router.boundary_steps.copy_(kept[1])
    return Levels(tuple(levels))
