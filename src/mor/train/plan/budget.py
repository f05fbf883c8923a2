"""From a budget in steps, tokens or FLOPs to a number of optimiser steps, and back."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mor.config import MoRConfig
from mor.model.flops import active_fractions, flops_per_token
from mor.model.routers.tables import warm_capacity
from mor.train.plan.depth import DepthSchedule
from mor.train.recipe.sections import Budget, RecipeError


@dataclass(frozen=True)
class Plan:
    """A budget made concrete.

    Attributes:
        steps: optimiser steps.
        tokens_per_step: over all devices and micro-batches.
        flops_per_step: training FLOPs of one step after all warm-up.
        warmup_extra: FLOPs that the router's warm-up adds over the whole run, less those that a
            depth schedule saves.
    """

    steps: int
    tokens_per_step: int
    flops_per_step: float
    warmup_extra: float

    @property
    def tokens(self) -> int:
        """Tokens seen in the whole run."""
        return self.steps * self.tokens_per_step

    @property
    def flops(self) -> float:
        """Training FLOPs of the whole run, as planned."""
        return self.steps * self.flops_per_step + self.warmup_extra


def warmup_steps(config: MoRConfig) -> int:
    """Optimiser steps during which the router lets more tokens through than it will later."""
    if config.router in ("expert_choice", "threshold", "random"):
        return config.router_capacity_warmup_steps
    return config.router_balance_warmup_steps if config.router == "token_choice" else 0


def training_flops(
    config: MoRConfig, seq_len: int, step: int | None = None, cap: int | None = None
) -> float:
    """Training FLOPs per token at an optimiser step.

    Args:
        config: the model.
        seq_len: tokens per sequence.
        step: 0-based; None: after all warm-up.
        cap: on recursions; None: R.
    """
    active = active_fractions(config)
    warmup = warmup_steps(config)
    if step is not None and step < warmup:
        if config.router == "token_choice":
            active = [1.0] * config.num_recursions
        else:
            active = [warm_capacity(c, step, warmup) for c in active]
    if cap is not None:
        active = active[:cap] + [0.0] * (config.num_recursions - cap)
    return flops_per_token(config, seq_len, active).training


class PlannedFlops:
    """Training FLOPs of the first n optimiser steps of a run, as planned.

    Args:
        config: of the model.
        seq_len: tokens per sequence.
        tokens_per_step: over all devices and micro-batches.
        caps: on depth, of every step of the run; None: no cap.
    """

    def __init__(
        self,
        config: MoRConfig,
        seq_len: int,
        tokens_per_step: int,
        caps: np.ndarray | None = None,
    ) -> None:
        self.config, self.seq_len, self.tokens_per_step = config, seq_len, tokens_per_step
        self.caps, self.warmup = caps, warmup_steps(config)
        self._costs: dict[tuple[int, int | None], float] = {}
        self._known = [0.0]

    def of(self, step: int) -> float:
        """FLOPs of optimiser step ``step``, 0-based."""
        cap = None if self.caps is None else int(self.caps[step])
        key = (min(step, self.warmup), cap)
        if key not in self._costs:
            one = training_flops(self.config, self.seq_len, key[0], cap)
            self._costs[key] = one * self.tokens_per_step
        return self._costs[key]

    def until(self, step: int) -> float:
        """FLOPs of the first ``step`` steps."""
        while len(self._known) <= step:
            self._known.append(self._known[-1] + self.of(len(self._known) - 1))
        return self._known[step]


def plan_budget(
    budget: Budget,
    config: MoRConfig,
    seq_len: int,
    tokens_per_step: int,
    schedule: DepthSchedule | None = None,
) -> Plan:
    """Steps that spend the budget: the largest number that does not exceed it, at least one.

    Args:
        budget: in steps, tokens or FLOPs.
        config: the model.
        seq_len: tokens per sequence.
        tokens_per_step: over all devices and micro-batches.
        schedule: depth caps, which make steps cheaper.

    Raises:
        RecipeError: the budget does not pay for a single step.
    """
    if schedule is not None:
        return _plan_capped(budget, config, seq_len, tokens_per_step, schedule)
    one = tokens_per_step * training_flops(config, seq_len)
    warmup = warmup_steps(config)

    def extra(step: int) -> float:
        return tokens_per_step * training_flops(config, seq_len, step) - one

    added = 0.0
    if budget.flops is None:
        steps = budget.steps or int((budget.tokens or 0) // tokens_per_step)
        added = sum(map(extra, range(min(steps, warmup))))
    else:
        steps = 0
        while steps < warmup and (steps + 1) * one + added + extra(steps) <= budget.flops:
            added += extra(steps)
            steps += 1
        if steps == warmup:
            steps = max(steps, int((budget.flops - added) // one))
    if steps < 1:
        raise _too_small(budget, tokens_per_step, one + (extra(0) if warmup else 0.0))
    return Plan(steps, tokens_per_step, one, added)


def _too_small(budget: Budget, tokens_per_step: int, first: float) -> RecipeError:
    return RecipeError(
        f"train.budget={budget.model_dump(exclude_none=True)} does not pay for one step of "
        f"{tokens_per_step} tokens ({first:.3g} FLOPs); raise it or shrink the batch"
    )


def _plan_capped(
    budget: Budget,
    config: MoRConfig,
    seq_len: int,
    tokens_per_step: int,
    schedule: DepthSchedule,
) -> Plan:
    """As :func:`plan_budget`. Where caps change depends on the number of steps that is sought."""

    def total(steps: int) -> float:
        caps = schedule.caps(steps)
        flops = PlannedFlops(config, seq_len, tokens_per_step, caps)
        warm = min(steps, flops.warmup)
        later = np.bincount(caps[warm:], minlength=config.num_recursions + 1)
        after = sum(count * capped[cap] for cap, count in enumerate(later) if count)
        return flops.until(warm) + after

    recursions = range(1, config.num_recursions + 1)
    capped = {c: tokens_per_step * training_flops(config, seq_len, None, c) for c in recursions}
    steps = budget.steps or int((budget.tokens or 0) // tokens_per_step)
    if budget.flops is not None:
        # Between these the number is found by halving: a longer run costs more, but for the few
        # steps by which the rounding of shares may shift.
        steps, beyond = 0, int(budget.flops // capped[1]) + 1
        while beyond - steps > 1:
            middle = (steps + beyond) // 2
            if total(middle) <= budget.flops:
                steps = middle
            else:
                beyond = middle
    if steps < 1:
        raise _too_small(budget, tokens_per_step, total(1))
    one = tokens_per_step * training_flops(config, seq_len)
    return Plan(steps, tokens_per_step, one, total(steps) - steps * one)
