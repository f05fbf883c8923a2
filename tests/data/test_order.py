"""An epoch's order: a permutation, whatever its length, found without walking to a place."""

from __future__ import annotations

import time
import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mor.data import order
from mor.data.order import SMALL, Shuffle, feistel

KEYS = st.lists(st.integers(0, 2**64 - 1), min_size=6, max_size=6)


@given(length=st.integers(1, 5000), keys=KEYS)
def test_every_place_is_taken_once(length: int, keys: list[int]) -> None:
    places = feistel(np.arange(length, dtype=np.uint64), length, np.array(keys, dtype=np.uint64))
    assert sorted(places.tolist()) == list(range(length))


def test_beyond_the_small_ones_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(order, "SMALL", 10)
    for length in (11, 4_096, 9_999):
        shuffle = Shuffle(length, 1, 2)
        assert sorted(shuffle[i] for i in range(length)) == list(range(length))


@given(length=st.sampled_from([7, 5_000, SMALL + 1, 10**9]), place=st.integers(0, 2**31))
def test_a_place_depends_on_seed_and_epoch_alone(length: int, place: int) -> None:
    place %= length
    walked = Shuffle(length, 3, 4)
    for other in (0, length - 1, place // 2):  # looking elsewhere changes nothing
        walked[other]
    assert walked[place] == Shuffle(length, 3, 4)[place] < length


@pytest.mark.parametrize("length", [SMALL, SMALL * 3])
def test_seed_and_epoch_change_the_order(length: int) -> None:
    def head(seed: int, epoch: int) -> list[int]:
        shuffle = Shuffle(length, seed, epoch)
        return [shuffle[i] for i in range(50)]

    assert head(0, 0) == head(0, 0)
    assert len({tuple(head(seed, epoch)) for seed in range(3) for epoch in range(3)}) == 9


def test_large_orders_look_random() -> None:
    """Neighbours land apart, every region is reached evenly, and nothing stays in place."""
    length = 10**7
    shuffle = Shuffle(length, 0, 0)
    landed = np.array([shuffle[i] for i in range(40_000)])
    counts = np.histogram(landed, bins=40, range=(0, length))[0]
    chi_square = float(((counts - 1000) ** 2 / 1000).sum())
    assert chi_square < 90  # 39 degrees of freedom: 39 expected, 73 once in a thousand
    assert abs(np.corrcoef(landed[:-1], landed[1:])[0, 1]) < 0.03
    assert abs(np.corrcoef(landed, np.arange(40_000))[0, 1]) < 0.03
    assert (landed % 2).mean() == pytest.approx(0.5, abs=0.015)


def test_a_billion_rows_cost_neither_memory_nor_time() -> None:
    tracemalloc.start()
    began = time.monotonic()
    shuffle = Shuffle(10**9, 0, 7)
    assert shuffle[987_654_321] != shuffle[987_654_320]
    assert time.monotonic() - began < 1.0
    assert tracemalloc.get_traced_memory()[1] < 2**22
    tracemalloc.stop()
