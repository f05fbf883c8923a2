"""``kv_sharing="propagate"``: what deeper passes see of tokens that left, written into their pages.

A wave is told of its tokens that have left before it runs its next pass, and of all others before
its coda: whatever attends to a token at a depth that it did not run finds how it ended. A token
ended in one way, so all depths read one entry of it. See :mod:`mor.model.propagation`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from mor.engine.batch import Piece
from mor.engine.lanes import Lanes
from mor.engine.mirror import to_device
from mor.engine.request import Wave
from mor.engine.store import KVStore
from mor.model.model import MoRModel
from mor.model.propagation import make_entries
from mor.ops.native import LanePass
from mor.ops.rope import Rotation

Ended = tuple[Wave, Sequence[int]]
"""A wave, and places in it whose tokens ran their last pass."""


def find_ended(pieces: Sequence[Piece]) -> list[Ended]:
    """Tokens that left before the pass that ``pieces`` run now, and were not told of."""
    found: list[Ended] = []
    for piece in pieces:
        wave = piece.wave
        if len(wave.unpublished) > len(wave.pending) + len(wave.deeper):
            going = {*wave.pending, *wave.deeper}
            found.append((wave, [place for place in wave.unpublished if place not in going]))
            wave.unpublished = sorted(going)
    return found


def find_left(waves: Sequence[Wave]) -> list[Ended]:
    """Tokens of waves that are through, as far as they were not told of."""
    found = [(wave, wave.unpublished) for wave in waves if wave.unpublished]
    for wave, _ in found:
        wave.unpublished = ()
    return found


def publish(
    model: MoRModel,
    store: KVStore,
    lanes: Lanes,
    turns: Rotation,
    ended: Sequence[Ended],
    quick: LanePass | None = None,
) -> None:
    """Write keys and values of tokens that ended, for all depths that they did not run.

    Args:
        model: the network.
        store: pages.
        lanes: with the streams of these tokens.
        turns: rotations of all positions, [places, d] each.
        ended: the tokens.
        quick: the block in one call of the kernels, where it can run so.
    """
    tokens = [
        (wave.lanes[place], wave.start + place, wave.depths[place], row)
        for wave, places in ended
        for row in (store.ended_row(wave.request),)
        for place in places
        if wave.depths[place] < wave.limit
    ]
    if not tokens:
        return
    store.push()
    columns = np.array(tokens, dtype=np.int64).T.copy()
    if quick is not None:
        at, place, passes, rows = columns
        # Cap and place among what is read do not matter here.
        quick.write_entries(
            torch.from_numpy(np.concatenate((place, passes, place, place, place, at, rows))),
            len(tokens),
        )
        return
    lane, position, ran, row = to_device(columns, lanes.device)
    cos, sin = (part.index_select(0, position)[None] for part in turns)
    hidden, origin = (s.index_select(0, lane)[None] for s in (lanes.hidden, lanes.origin))
    slots = store.block.slots(row, position)
    for layer, heads in enumerate(make_entries(model, hidden, ran[None], (cos, sin), origin)):
        key, value = (one[0].transpose(0, 1) for one in heads)
        store.pool.write(slots[:, layer], key, value)
