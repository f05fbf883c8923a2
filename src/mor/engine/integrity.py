"""The check that nothing is lost and nothing is owned twice."""

from __future__ import annotations

from mor.engine.scheduler import Scheduler
from mor.errors import MorError


def check_residents(scheduler: Scheduler) -> None:
    """Pages, rows, lanes and waves of all resident requests fit together.

    Raises:
        MorError: what is wrong. It is always our mistake, never the user's.
    """
    store, lanes = scheduler.store, scheduler.lanes
    store.check(scheduler.free_rows)
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
