"""Pages: each is free or owned once, slots are told apart, and what is wrong is found."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mor.engine.integrity import check_pages
from mor.engine.memory import pages_for
from mor.engine.pages import PagePool, PageTables
from mor.engine.store import KVStore
from mor.errors import MorError
from tests.strategies import configs, small_config

CPU = torch.device("cpu")
PAGES = 640  # enough for the largest example: 4 rows of 40 tokens, a page each, in 4 layers


def pool_of(pages: int, page_size: int) -> PagePool:
    return PagePool(pages, page_size, 2, 4, torch.float32, CPU)


@given(
    st.integers(1, 5),
    st.integers(0, 3),
    st.lists(st.tuples(st.integers(0, 3), st.integers(0, 12), st.booleans()), max_size=30),
)
def test_pages_are_owned_once_and_slots_never_meet(
    page_size: int, layers: int, steps: list[tuple[int, int, bool]]
) -> None:
    pool = pool_of(PAGES, page_size)
    tables = [PageTables(pool, 4, layers, 40), PageTables(pool, 4, 1, 40)]
    for row, more, release in steps:
        for table in tables:
            if release:
                table.release(row)
            elif table.lengths[row] + more <= 40:
                length = table.lengths[row] + more
                free, missing = pool.free, table.missing(row, length)
                table.extend(row, length)
                assert free - pool.free == missing
                assert table.missing(row, length) == 0
        check_pages(pool, tables, [[], []])
        slots = []
        for table in tables:
            for own, length in enumerate(table.lengths):
                rows = torch.full((length,), own)
                slots += table.slots(rows, torch.arange(length)).flatten().tolist()
        assert len(set(slots)) == len(slots)
        assert all(0 <= slot < PAGES * page_size for slot in slots)
    for table in tables:
        for row in range(4):
            table.release(row)
    check_pages(pool, tables, [[0, 1, 2, 3]] * 2)
    assert pool.free == PAGES


def lose(pool: PagePool, table: PageTables) -> None:
    pool.take(1)


def double(pool: PagePool, table: PageTables) -> None:
    table.table[0, 0, 0] = table.table[0, 0, 1]


def shrink(pool: PagePool, table: PageTables) -> None:
    table.lengths[0] = 1


def forget(pool: PagePool, table: PageTables) -> None:
    table.extend(1, 1)


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lose, "9 pages are free or owned, 9 of them different; the pool has 10"),
        (double, "10 pages are free or owned, 9 of them different"),
        (shrink, "row 0 holds 1 tokens in 2 pages per layer; 1 would be right"),
        (forget, "row 1 is idle but owns pages"),
    ],
)
def test_every_kind_of_harm_is_found(harm: Any, message: str) -> None:
    pool = pool_of(10, 2)
    table = PageTables(pool, 2, 2, 8)
    table.extend(0, 4)
    check_pages(pool, [table], [[1]])
    harm(pool, table)
    with pytest.raises(MorError, match=message):
        check_pages(pool, [table], [[1]])


def test_more_pages_than_there_are_cannot_be_taken() -> None:
    with pytest.raises(RuntimeError, match="3 pages wanted, 2 are free"):
        pool_of(2, 1).take(3)


@given(configs(), st.integers(0, 30), st.integers(1, 5), st.data())
def test_the_worst_case_is_what_full_depth_takes(
    config: Any, tokens: int, page_size: int, data: st.DataObject
) -> None:
    """Counted by hand: layers that leave entries, times pages per layer."""
    limit = data.draw(st.integers(1, config.num_recursions))
    store = KVStore(config, 400, page_size, 1, 40, limit, torch.float32, CPU)
    store.private.extend(0, tokens)
    for row in range(store.groups):
        store.block.extend(row, tokens)
    assert store.pool.used == store.most_pages(tokens, limit)
    block = config.num_recursion_layers
    if config.kv_sharing == "propagate":  # a row more, of tokens as they ended
        block *= limit + 1
    elif config.kv_sharing != "recursive":
        block *= limit
    layers = config.num_prelude_layers + config.num_coda_layers + block
    assert store.pool.used == layers * -(-tokens // page_size)
    assert store.nbytes() == layers * tokens * 2 * config.num_key_value_heads * config.head_dim * 4


def test_the_longest_sequence_that_fits_does_fit() -> None:
    config = small_config("threshold")
    for pages in range(1, 40):
        store = KVStore(config, pages, 4, 1, 200, 3, torch.float32, CPU)
        longest = store.longest(3)
        assert pages_for(config, longest, 3, 4) <= pages
        assert pages_for(config, longest + 1, 3, 4) > pages
