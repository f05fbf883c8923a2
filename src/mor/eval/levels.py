"""Calibration at many capacities of one model, so that each request can choose its own.

:mod:`mor.folder.levels` says what a level is.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.utils.data import Dataset

from mor.errors import MorError
from mor.eval.calibrate import Known, calibrate
from mor.eval.passes import Tick
from mor.folder.levels import Level, Levels
from mor.hf.modeling import MoRForCausalLM
from mor.model.routers import BoundaryRouter

FACTORS = (0.1, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5)
FULLEST = 0.98  # share of tokens; a boundary below all of them is no quantile of any sample


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
