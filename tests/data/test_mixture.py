"""Interleaving by weight: within one sample of the shares after every sample."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mor.data.mixture import MAX_PERIOD, Interleaving
from mor.errors import MorError

WEIGHTS = st.lists(st.integers(1, 60), min_size=1, max_size=6)


@given(weights=WEIGHTS, seed=st.integers(0, 100))
def test_within_one_sample_of_the_shares_at_every_prefix(weights: list[int], seed: int) -> None:
    mixture, given_ = Interleaving(weights, seed), [0] * len(weights)
    for n in range(1, min(2 * sum(weights), 400) + 1):
        source, number = mixture.at(n - 1)
        assert number == given_[source]  # no sample of a source twice, none left out
        assert mixture.first(source, number) == n - 1
        given_[source] += 1
        for count, weight in zip(given_, weights, strict=True):
            assert abs(count - Fraction(weight * n, sum(weights))) < 1


def test_any_place_is_found_at_once() -> None:
    mixture = Interleaving([0.6, 0.3, 0.1])
    assert mixture.period == 10
    assert mixture.counts == [6, 3, 1]
    source, number = mixture.at(3)
    turns = 10**14
    assert mixture.at(10 * turns + 3) == (source, turns * mixture.counts[source] + number)


@pytest.mark.parametrize(
    ("weights", "counts"),
    [([1.0], [1]), ([0.7, 0.2, 0.1], [7, 2, 1]), ([2, 6], [1, 3]), ([0.1] * 3, [1, 1, 1])],
)
def test_shares_are_exact(weights: list[float], counts: list[int]) -> None:
    assert Interleaving(weights).counts == counts


def test_shares_of_a_large_denominator_are_rounded() -> None:
    weights = [123_456_789.0, 987_654_321.0, 1.0]
    mixture = Interleaving(weights)
    assert mixture.period == MAX_PERIOD
    for count, weight in zip(mixture.counts, weights, strict=True):
        assert count >= 1
        assert abs(count / mixture.period - weight / sum(weights)) <= 1.5 / MAX_PERIOD


def test_seed_decides_between_equals() -> None:
    def head(seed: int) -> list[int]:
        mixture = Interleaving([1, 1, 1, 1], seed)
        return [mixture.at(i)[0] for i in range(4)]

    assert head(5) == head(5)
    assert len({tuple(head(seed)) for seed in range(20)}) > 3
    assert all(sorted(head(seed)) == [0, 1, 2, 3] for seed in range(20))


@pytest.mark.parametrize("weights", [[], [1, 0], [1, -2], [float("nan")], [float("inf"), 1]])
def test_wrong_weights(weights: list[Any]) -> None:
    with pytest.raises(MorError, match=r"weights are .*, expected numbers above 0"):
        Interleaving(weights)
