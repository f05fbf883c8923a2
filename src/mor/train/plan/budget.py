"""From a budget in steps, tokens or FLOPs to a number of optimiser steps, and back."""

from __future__ import annotations

from dataclasses import dataclass

from mor.config import MoRConfig
from mor.model.flops import active_fractions, flops_per_token
from mor.model.routers.base import warm_capacity
from mor.train.recipe.sections import Budget, RecipeError


@dataclass(frozen=True)
class Plan:
    """A budget made concrete.

    Attributes:
        steps: optimiser steps.
        tokens_per_step: over all devices and micro-batches.
        flops_per_step: training FLOPs of one step after all warm-up.
        warmup_extra: FLOPs that the router's warm-up adds over the whole run.
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


def training_flops(config: MoRConfig, seq_len: int, step: int | None = None) -> float:
    """Training FLOPs per token at optimiser step ``step`` (0-based; None: after all warm-up)."""
    active = active_fractions(config)
    warmup = warmup_steps(config)
    if step is not None and step < warmup:
        if config.router == "token_choice":
            active = [1.0] * config.num_recursions
        else:
            active = [warm_capacity(c, step, warmup) for c in active]
    return flops_per_token(config, seq_len, active).training


class PlannedFlops:
    """Training FLOPs of the first n optimiser steps of a run, as planned.

    Args:
        config: of the model.
        seq_len: tokens per sequence.
        tokens_per_step: over all devices and micro-batches.
    """

    def __init__(self, config: MoRConfig, seq_len: int, tokens_per_step: int) -> None:
        self.config, self.seq_len, self.tokens_per_step = config, seq_len, tokens_per_step
        self._known = [0.0]

    def until(self, step: int) -> float:
        """FLOPs of the first ``step`` steps."""
        while len(self._known) <= step:
            one = training_flops(self.config, self.seq_len, len(self._known) - 1)
            self._known.append(self._known[-1] + one * self.tokens_per_step)
        return self._known[step]


def plan_budget(budget: Budget, config: MoRConfig, seq_len: int, tokens_per_step: int) -> Plan:
    """Steps that spend the budget: the largest number that does not exceed it, at least one.

    Raises:
        RecipeError: the budget does not pay for a single step.
    """
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
        first = one + (extra(0) if warmup else 0.0)
        raise RecipeError(
            f"train.budget={budget.model_dump(exclude_none=True)} does not pay for one step of "
            f"{tokens_per_step} tokens ({first:.3g} FLOPs); raise it or shrink the batch"
        )
    return Plan(steps, tokens_per_step, one, added)
