"""The checks that nothing is lost and nothing is owned twice: pages, rows, lanes, waves.

What they find is a fault of the engine, never of the caller.
"""

from __future__ import annotations

from mor.engine.pages import PagePool, PageTables
from mor.engine.scheduler import Scheduler
from mor.engine.store import KVStore
from mor.errors import MorError


def check_pages(pool: PagePool, tables: list[PageTables], idle_rows: list[list[int]]) -> None:
    """Every page is free or owned by one row, and every row owns just what its tokens need.

    Args:
        pool: the pool.
        tables: all tables into it.
        idle_rows: for each table the rows that nobody uses, which must own nothing.

    Raises:
        MorError: what is wrong.
    """
    seen = pool.free_pages()
    for table, idle in zip(tables, idle_rows, strict=True):
        for row, length in enumerate(table.lengths):
            seen += table.owned(row)
            wanted = -(-length // pool.page_size)
            if table.columns[row] != wanted:
                raise MorError(
                    f"page table row {row} holds {length} tokens in {table.columns[row]} pages per "
                    f"layer; {wanted} would be right"
                )
        for row in idle:
            if table.columns[row]:
                raise MorError(f"page table row {row} is idle but owns pages")
    if len(seen) != pool.num_pages or len(set(seen)) != pool.num_pages:
        raise MorError(
            f"{len(seen)} pages are free or owned, {len(set(seen))} of them different; "
            f"the pool has {pool.num_pages}"
        )


def check_store(store: KVStore, idle: list[int]) -> None:
    """Every page of the store is free or owned by one row of its two tables.

    Args:
        store: the pages.
        idle: rows that belong to no request.

    Raises:
        MorError: what is wrong.
    """
    rows = [row for one in idle for row in store.block_rows(one)]
    check_pages(store.pool, [store.private, store.block], [idle, rows])


def check_residents(scheduler: Scheduler) -> None:
    """Pages, rows, lanes and waves of all resident requests fit together.

    Raises:
        MorError: what is wrong.
    """
    store, lanes = scheduler.store, scheduler.lanes
    check_store(store, scheduler.free_rows)
    rows = sorted([r.row for r in scheduler.running if r.row is not None] + scheduler.free_rows)
    if rows != list(range(len(rows))) or len(rows) != len(store.private.lengths):
        raise MorError(f"page table rows {rows} are not each in use once or free once")
    waves = [r.wave for r in scheduler.running if r.wave is not None]
    if sum(map(len, waves)) + lanes.free != lanes.count:
        raise MorError("lanes of tokens in flight and free lanes are not all lanes")
    prompts = sum(len(wave) for wave in waves if wave.prompt)
    residents = len(store.private.lengths)
    if scheduler.prompt_lanes + prompts + residents != lanes.count:
        raise MorError("lanes for prompts are not each in use once or free once")
    if len(scheduler.ready) + len(scheduler.exited) != len(waves):
        raise MorError("a wave is neither ready nor waiting for the coda")
    for request in scheduler.running:
        length = request.computed if request.wave is None else request.wave.end
        assert request.row is not None
        if store.private.lengths[request.row] != length:
            raise MorError(f"{request.group}: {length} tokens entered, its pages hold others")
