"""Budgets: as many steps as they pay for, and not one more."""

from __future__ import annotations

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from mor import MoRConfig
from mor.train import RecipeError, plan_budget
from mor.train.plan.budget import training_flops
from mor.train.recipe.sections import Budget
from tests.strategies import configs, small_config

TOKENS = 4 * 16


def spent(config: MoRConfig, steps: int) -> float:
    """Step by step, as the run itself goes."""
    return TOKENS * sum(training_flops(config, 16, step) for step in range(steps))


def test_steps_and_tokens() -> None:
    config = small_config("fixed")
    assert plan_budget(Budget(steps=7), config, 16, TOKENS).steps == 7
    plan = plan_budget(Budget(tokens=10 * TOKENS + 1), config, 16, TOKENS)
    assert (plan.steps, plan.tokens) == (10, 10 * TOKENS)
    assert plan.flops == pytest.approx(spent(config, 10))


@pytest.mark.parametrize("budget", [Budget(tokens=TOKENS - 1), Budget(flops=1000)])
@pytest.mark.parametrize("warmup", [0, 5])
def test_a_budget_below_one_step(budget: Budget, warmup: int) -> None:
    config = small_config("threshold", router_capacity_warmup_steps=warmup)
    with pytest.raises(RecipeError, match="does not pay for one step of 64 tokens"):
        plan_budget(budget, config, 16, TOKENS)


def test_capacity_warmup_by_hand() -> None:
    config = small_config("expert_choice", num_recursions=2, router_capacity_warmup_steps=2)
    # 1 + cos at 0 and at half of the warm-up: capacities 1 and 0.75, then 0.5.
    shares = [[1.0, 1.0], [1.0, 0.75], [1.0, 0.5], [1.0, 0.5]]
    at = [
        training_flops(small_config("threshold", router_capacities=s, num_recursions=2), 16)
        for s in shares
    ]
    assert [training_flops(config, 16, step) for step in range(4)] == pytest.approx(at)
    plan = plan_budget(Budget(steps=4), config, 16, TOKENS)
    assert plan.flops == pytest.approx(TOKENS * sum(at))


def test_balance_warmup_runs_every_token_to_the_end() -> None:
    config = small_config("token_choice", router_balance_warmup_steps=3)
    full = small_config("token_choice")
    assert training_flops(config, 16, 2) > training_flops(full, 16)
    assert training_flops(config, 16, 3) == training_flops(full, 16)
    plan = plan_budget(Budget(flops=spent(config, 5) * 1.001), config, 16, TOKENS)
    assert plan.steps == 5


def test_a_very_long_warmup_costs_no_time() -> None:
    config = small_config("threshold", router_capacity_warmup_steps=10**9)
    assert plan_budget(Budget(steps=3), config, 16, TOKENS).steps == 3
    assert plan_budget(Budget(flops=spent(config, 3) * 1.01), config, 16, TOKENS).steps == 3


@given(configs(), st.integers(0, 12), st.floats(1.0, 40.0))
def test_a_budget_is_spent_and_never_exceeded(
    config: MoRConfig, warmup: int, factor: float
) -> None:
    config.router_capacity_warmup_steps = config.router_balance_warmup_steps = warmup
    flops = spent(config, 1) * factor
    plan = plan_budget(Budget(flops=flops), config, 16, TOKENS)
    assert plan.flops == pytest.approx(spent(config, plan.steps), rel=1e-9)
    assert plan.flops <= flops * (1 + 1e-9)
    assert spent(config, plan.steps + 1) > flops * (1 - 1e-9)


@given(configs(), configs(), st.floats(5.0, 500.0))
def test_twins_at_equal_flops(one: MoRConfig, other: MoRConfig, factor: float) -> None:
    flops = spent(one, 1) * factor
    assume(flops > spent(other, 1))
    plans = [plan_budget(Budget(flops=flops), config, 16, TOKENS) for config in (one, other)]
    assert abs(plans[0].flops - plans[1].flops) <= max(plan.flops_per_step for plan in plans)
