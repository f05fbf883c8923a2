"""From a budget in steps, tokens or FLOPs to a number of optimiser steps, and back."""

from __future__ import annotations

from dataclasses import dataclass

from mor.config import MoRConfig
from mor.model.flops import active_fractions, flops_per_token
from mor.model.router_base import warm_capacity
from mor.train.recipe import Budget, RecipeError


@dataclass(frozen=True)
class Plan:
    """A budget made concrete.

    Attributes:
        steps: optimiser steps.
        tokens_per_step: over all devices and micro-batches.
        flops_per_step: training FLOPs of one step at final capacities.
        warmup_extra: FLOPs that capacity warm-up adds over the whole run.
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


def step_flops(config: MoRConfig, seq_len: int, step: int | None = None) -> float:
    """Training FLOPs per token at optimiser step ``step`` (None: after all warm-up)."""
    active = active_fractions(config)
    if step is not None and config.router in ("expert_choice", "threshold", "random"):
        warmup = config.router_capacity_warmup_steps
        active = [warm_capacity(c, step, warmup) for c in active]
    return flops_per_token(config, seq_len, active).training


def plan_budget(budget: Budget, config: MoRConfig, seq_len: int, tokens_per_step: int) -> Plan:
    """Steps that spend the budget: the largest number that does not exceed it, at least one.

    Raises:
        RecipeError: the budget does not pay for a single step.
    """
    settled = tokens_per_step * step_flops(config, seq_len)
    warmup = config.router_capacity_warmup_steps if config.is_routed else 0
    extra = [
        tokens_per_step * step_flops(config, seq_len, step) - settled for step in range(warmup)
    ]
    if budget.steps is not None:
        steps = budget.steps
    elif budget.tokens is not None:
        steps = int(budget.tokens // tokens_per_step)
    else:
        assert budget.flops is not None
        steps, spent = 0, 0.0
        while steps < warmup and spent + settled + extra[steps] <= budget.flops:
            spent += settled + extra[steps]
            steps += 1
        if steps == warmup:
            steps += int((budget.flops - spent) // settled)
    if steps < 1:
        raise RecipeError(
            f"train.budget={budget.model_dump(exclude_none=True)} does not pay for one step of "
            f"{tokens_per_step} tokens ({settled:.3g} FLOPs); raise it or shrink the batch"
        )
    return Plan(steps, tokens_per_step, settled, sum(extra[:steps]))
