"""The scaling law of loops, and what a pass is."""

from __future__ import annotations

from typing import Any

import pytest

from mor import MoRForCausalLM
from mor.errors import MorError
from mor.study import runs, tables
from mor.study.file import Study
from mor.study.law import Point, fit_recurrence_law
from mor.study.tables import law_points, law_table
from tests.strategies import small_config
from tests.study.studies import record

# The law ----------------------------------------------------------------------------------------


def synthetic(phi: float, tokens: tuple[float, ...], noise: float = 0.0) -> list[Point]:
    points = []
    for size in (1e6, 3e6, 1e7):
        for passes in (1, 2, 3):
            for amount in tokens:
                wobble = noise * (-1) ** len(points)
                effective = 0.2 * size + passes**phi * size
                nll = 1.7 + 400 * effective**-0.4 + 300 * amount**-0.35 + wobble
                points.append(Point(0.2 * size, size, passes, amount, nll))
    return points


@pytest.mark.parametrize("phi", [0.0, 0.46, 1.0])
def test_the_law_finds_a_known_exponent(phi: float) -> None:
    law = fit_recurrence_law(synthetic(phi, (1e6, 4e6, 1e7)))
    assert law.phi == pytest.approx(phi, abs=0.02)
    assert law.e == pytest.approx(1.7, abs=0.05)
    assert law.alpha == pytest.approx(0.4, abs=0.02)
    assert law.a == pytest.approx(400, rel=0.3)
    assert law.error < 1e-3


def test_the_law_at_equal_tokens_and_its_interval() -> None:
    law = fit_recurrence_law(synthetic(0.46, (1e7,), noise=1e-3), resamples=10)
    assert law.b == 0.0
    assert law.phi == pytest.approx(0.46, abs=0.05)
    assert law.interval is not None
    assert law.interval[0] <= law.phi + 0.02
    assert law.interval[1] >= law.phi - 0.02
    assert law.interval[1] - law.interval[0] < 0.5


def test_constants_have_a_meaning_where_the_law_does_not_hold() -> None:
    """A free fit of losses that fall ever faster has E above all of them, and A below 0."""
    points = []
    for size in (1e6, 2e6, 4e6):
        for passes in (1, 3):
            for amount in (1e6, 2e6, 4e6):
                fall = ((passes * size / 1e6) ** 0.5 + (amount / 1e6) ** 0.5) / 4
                points.append(Point(0.2 * size, size, passes, amount, 5 - fall))
    law = fit_recurrence_law(points)
    assert 0 <= law.e < min(point.nll for point in points)
    assert min(law.a, law.b, law.alpha, law.beta) >= 0
    assert law.error < 0.2


def test_the_law_needs_loops_and_points() -> None:
    with pytest.raises(MorError, match=r"4 points, expected at least 5"):
        fit_recurrence_law(synthetic(0.5, (1e7,))[:4])
    flat = [point for point in synthetic(0.5, (1e6, 1e7, 1e8)) if point.passes == 2]
    with pytest.raises(MorError, match=r"same number of passes"):
        fit_recurrence_law(flat)
    with pytest.raises(MorError, match=r"0 points"):
        fit_recurrence_law([])


def test_passes_of_a_routed_model_are_the_mean(study: Study) -> None:
    routed = record("expert", 2.0, summary={"passes": 1.5})
    assert law_points([routed, record("plain", 2.0)]) == [
        Point(50, 50, 1.5, 10, 2.0),
        Point(50, 50, 2.0, 10, 2.0),
    ]
    assert law_table([routed]) is None


@pytest.mark.parametrize(
    ("fields", "passes"),
    [
        ({"router": "fixed"}, 3.0),  # though its configuration names capacities
        ({"router": "fixed", "router_fixed_depth": 2}, 2.0),
        ({"router": "threshold", "router_capacities": [1.0, 0.5, 0.1]}, 1.6),
        ({"router": "token_choice"}, 2.0),
    ],
)
def test_passes_are_those_that_the_router_runs(fields: dict[str, Any], passes: float) -> None:
    config = small_config(**fields)
    told = runs.describe_block(config)
    assert told["passes"] == pytest.approx(passes)
    layers = sum(weight.numel() for weight in MoRForCausalLM(config).model.block.parameters())
    assert told["shared_parameters"] == layers > 0


def test_seeds_are_no_further_points_of_the_law() -> None:
    four = synthetic(0.46, (1e7,))[:4]
    with pytest.raises(MorError, match=r"4 points, expected at least 5 .* that differ"):
        fit_recurrence_law([*four, *four, *four])
    # Most draws of five points out of five hold fewer than five different ones.
    assert fit_recurrence_law(synthetic(0.46, (1e7,))[:5], resamples=8).interval is None


def test_a_run_of_one_pass_counts_once_in_its_own_family(monkeypatch: pytest.MonkeyPatch) -> None:
    counts: list[int] = []

    def count(points: list[Point], resamples: int) -> None:
        counts.append(len(points))
        raise MorError("counted")

    monkeypatch.setattr(tables, "fit_recurrence_law", count)
    once = {"num_recursions": 1, "passes": 1.0}
    law_table([record("a", 3.0, family="x", summary=once), record("b", 2.0, family="x")])
    assert counts == [2]
