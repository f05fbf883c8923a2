"""The checks that nothing is lost and nothing is owned twice: pages, rows, lanes, waves.

What they find is a fault of the engine, never of the caller.
"""

from __future__ import annotations

from collections import Counter

from mor.engine.pages import PagePool, PageTables
from mor.engine.prefix import Node
from mor.engine.scheduler import Scheduler
from mor.engine.store import KVStore
from mor.errors import MorError


def check_pages(
    pool: PagePool,
    tables: list[PageTables],
    idle_rows: list[list[int]],
    kept: Counter[int] | None = None,
) -> None:
    """Every page is free, or read by rows or kept, and every row reads just what its tokens need.

    Args:
        pool: the pool.
        tables: all tables into it.
        idle_rows: for each table the rows that nobody uses, which must own nothing.
        kept: how often each page is kept for texts to come.

    Raises:
        MorError: what is wrong.
    """
    kept = Counter() if kept is None else kept
    seen = pool.free_pages()
    read: Counter[int] = Counter()
    for table, idle in zip(tables, idle_rows, strict=True):
        for row, length in enumerate(table.lengths):
            read.update(table.owned(row))
            wanted = -(-length // pool.page_size)
            if table.columns[row] != wanted:
                raise MorError(
                    f"page table row {row} holds {length} tokens in {table.columns[row]} pages per "
                    f"layer; {wanted} would be right"
                )
            if length % pool.page_size:
                for page in table.pages(row, wanted - 1, wanted)[0]:
                    if pool.readers[page] > 1:
                        raise MorError(f"page table row {row} writes to a page that others read")
        for row in idle:
            if table.columns[row]:
                raise MorError(f"page table row {row} is idle but owns pages")
    for page, count in read.items():
        seen += [page] * (1 + max(0, count - pool.readers[page]))
    seen += [page for page in kept if page not in read]
    if len(seen) != pool.num_pages or len(set(seen)) != pool.num_pages:
        raise MorError(
            f"{len(seen)} pages are free or owned, {len(set(seen))} of them different; "
            f"the pool has {pool.num_pages}"
        )
    for page in range(pool.num_pages):
        if (pool.readers[page], pool.keepers[page]) != (read[page], kept[page]):
            raise MorError(
                f"page {page} has {read[page]} readers and is kept {kept[page]} times; "
                f"{pool.readers[page]} and {pool.keepers[page]} are counted"
            )
    if pool.free != pool.num_pages - len(read):
        raise MorError(f"{pool.free} pages are counted as free; {len(read)} are read")


def check_store(store: KVStore, idle: list[int]) -> None:
    """Every page of the store is free, or read by rows of its two tables, or kept.

    Args:
        store: the pages.
        idle: rows that belong to no request.

    Raises:
        MorError: what is wrong.
    """
    rows = [row for one in idle for row in store.block_rows(one)]
    kept = store.prefixes.keepers()
    check_pages(store.pool, [store.private, store.block], [idle, rows], kept)
    gone: set[Node | None] = set()
    for node in store.prefixes.nodes():
        if node.parent in gone or not node.alive:
            raise MorError("a cached text would go before one that goes on from it")
        gone.add(node)


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
    if len(scheduler.ready) + len(scheduler.exited) + len(scheduler.flying) != len(waves):
        raise MorError("a wave is neither ready, nor in flight, nor waiting for the coda")
    for request in scheduler.running:
        guessed = 0 if request.draft is None else len(request.draft.tokens)
        length = request.computed + guessed if request.wave is None else request.wave.end
        assert request.row is not None
        if store.private.lengths[request.row] != length:
            raise MorError(f"{request.group}: {length} tokens entered, its pages hold others")
