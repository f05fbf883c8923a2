"""What the router's answers change: waves that were in flight are through, or ready for more.

Some answers are known before they are read: who starts where every token runs depth 0, and that
nobody goes deeper than its cap.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from mor.engine.batch import Piece
from mor.engine.request import Wave
from mor.engine.scheduler import Scheduler

_ALONE = (0,)  # the place of a token that is a wave by itself


def note_entered(scheduler: Scheduler, waves: list[Wave], go_on: list[bool]) -> None:
    """Note the router's answers at depth 0, token by token."""
    flying, ready, exited = scheduler.flying, scheduler.ready, scheduler.exited
    start = 0
    for wave in waves:
        end = start + wave.end - wave.start
        if wave.request.wave is wave:  # it was not dropped while it flew
            del flying[wave]
            if end - start == 1:  # nearly always
                wave.pending = _ALONE if go_on[start] else ()
            else:
                wave.pending = [place for place, goes in enumerate(go_on[start:end]) if goes]
            (ready if wave.pending else exited)[wave] = None
        start = end


def note_capped(
    scheduler: Scheduler, pieces: tuple[Piece, ...], recursions: int
) -> Callable[[list[bool]], None] | None:
    """Note what is known of a tick before its answers: tokens at their cap go no deeper.

    Returns:
        What takes the answers of all its tokens; None where nothing is left to know.
    """
    capped = [piece.wave.depth + recursions >= piece.wave.limit for piece in pieces]
    for piece, known in zip(pieces, capped, strict=True):
        if known:
            _note_ran(scheduler, piece, [False] * len(piece.places), recursions)
    if all(capped):
        return None
    return partial(_note_ticked, scheduler, pieces, capped, recursions)


def _note_ticked(
    scheduler: Scheduler,
    pieces: Sequence[Piece],
    known: Sequence[bool],
    recursions: int,
    go_on: list[bool],
) -> None:
    """Note the router's answers after a tick, but for pieces that are ``known`` already."""
    start = 0
    for piece, done in zip(pieces, known, strict=True):
        end = start + len(piece.places)
        if not done:
            _note_ran(scheduler, piece, go_on[start:end], recursions)
        start = end


def _note_ran(scheduler: Scheduler, piece: Piece, going: list[bool], recursions: int) -> None:
    wave = piece.wave
    if wave.request.wave is not wave:
        return  # it was dropped while it flew
    del scheduler.flying[wave]
    wave.note_ran(piece.places, going, recursions)
    if wave.pending or wave.deeper:
        scheduler.ready[wave] = None
    else:
        scheduler.exited[wave] = None
        if scheduler.cohort:
            scheduler.cohort.pop(wave, None)
