"""Which documents are kept for validation."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mor.data.splits import choose_validation
from mor.errors import MorError

sizes_of_documents = st.dictionaries(st.text(), st.integers(1, 10_000), min_size=2, max_size=30)
fractions = st.floats(0, 1, exclude_min=True, exclude_max=True)


@given(sizes=sizes_of_documents, fraction=fractions, seed=st.integers(0, 2**32))
def test_both_splits_hold_a_document(sizes: dict[str, int], fraction: float, seed: int) -> None:
    chosen = choose_validation(sizes, fraction, seed)
    assert 1 <= len(chosen) < len(sizes)
    assert chosen < set(sizes)


@given(sizes=sizes_of_documents, fraction=fractions, seed=st.integers(0, 5), data=st.data())
def test_order_does_not_matter(
    sizes: dict[str, int], fraction: float, seed: int, data: st.DataObject
) -> None:
    shuffled = dict(data.draw(st.permutations(list(sizes.items()))))
    assert choose_validation(shuffled, fraction, seed) == choose_validation(sizes, fraction, seed)


@given(
    sizes=st.dictionaries(st.text(), st.integers(1, 100), min_size=60, max_size=80),
    fraction=st.floats(0.1, 0.9),
    seed=st.integers(0, 2**32),
)
def test_fraction_is_met_to_half_a_document(
    sizes: dict[str, int], fraction: float, seed: int
) -> None:
    taken = sum(sizes[name] for name in choose_validation(sizes, fraction, seed))
    assert abs(taken - fraction * sum(sizes.values())) <= max(sizes.values()) / 2


def test_the_choice_is_the_same_on_every_machine() -> None:
    sizes = {f"{number}.txt": 100 + number for number in range(20)}
    assert choose_validation(sizes, 0.1, 0) == {"1.txt", "3.txt"}
    assert choose_validation(sizes, 0.1, 1) == {"12.txt", "6.txt"}


def test_names_that_are_not_unicode() -> None:
    assert len(choose_validation({"\udcff.txt": 1, "a.txt": 2}, 0.5, 0)) == 1


@pytest.mark.parametrize("sizes", [{}, {"only.txt": 10}])
def test_fewer_than_two_documents(sizes: dict[str, int]) -> None:
    with pytest.raises(MorError, match=rf"at least 2 different documents .* found {len(sizes)}"):
        choose_validation(sizes, 0.05, 0)


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1, 1.5, float("nan")])
def test_fraction_out_of_range(fraction: float) -> None:
    with pytest.raises(MorError, match=rf"validation_fraction is {fraction}, expected more than 0"):
        choose_validation({"a": 1, "b": 1}, fraction, 0)
