"""The recursion stage over a batch: score, choose, compact, recurse, update.

One loop serves every router, training and decoding alike (:func:`choose` says by which rule).
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from mor.config.choices import Routing
from mor.model.attend.protocol import Attend
from mor.model.layout import Layout
from mor.model.propagation import Propagation, Source
from mor.model.reached import Reached
from mor.model.recorder import Recorder
from mor.model.routers.base import Router, Scores
from mor.model.routers.selection import as_mask
from mor.ops import planned
from mor.ops.compaction import Packing, nobody, pack, pack_flat, pack_indices, pack_within
from mor.ops.rope import Rotation
from mor.ops.segments import Segments


class Block(Source, Protocol):
    """What :func:`run_recursions` needs of the network; see :class:`mor.model.model.MoRModel`."""

    @property
    def needs_origin(self) -> bool:
        """Whether passes or updates look at what was carried before depth 0."""
        ...

    def narrow(self, carried: Tensor) -> Tensor:
        """The stream [A, M, D] that is seen of what is carried [A, M, W]."""
        ...

    def recurse(
        self,
        hidden: Tensor,
        depth: int | Tensor,
        rope: Rotation,
        attend: Attend,
        origin: Tensor | None = None,
    ) -> Tensor:
        """One pass over what is carried, [A, M, W] -> [A, M, W]."""
        ...


def run_recursions(
    block: Block,
    router: Router,
    hidden: Tensor,
    rope: Rotation,
    layout: Layout,
    *,
    routing: Routing,
    max_depth: int,
    recorder: Recorder,
) -> tuple[Tensor, Tensor]:
    """Run up to ``max_depth`` recursions over the tokens of a batch.

    Args:
        block: the model.
        router: what chooses depth.
        hidden: [A, N, W] what is carried between passes, after the prelude; W is D without a seam.
        rope: rotation of all tokens, each [A, N, head_dim].
        layout: of the batch: positions, rows, keys and values.
        routing: ``causal`` asks ``router.decide``, ``topk`` ``router.select``, ``full`` nobody:
            every token runs all depths.
        max_depth: depth cap, at most R.
        recorder: keeps states and traces, and takes the router's losses.

    Returns:
        What is carried [A, N, W] after the last recursion of each token, and how many recursions
        each token ran [A, N]; 0 at padding.
    """
    origin, kv, positions = hidden, layout.kv, layout.positions
    depths = torch.zeros_like(positions)
    reached = everyone = Reached.everyone(layout.rows, hidden)
    started = router.start(block.narrow(hidden), max_depth)
    bounds = bound_sizes(router, started, layout, routing, max_depth)
    longest = None if bounds is None else max(layout.kv.run_lengths or [layout.rows.width])
    propagation: Propagation | None = None
    if block.config.kv_sharing == "propagate":
        propagation = Propagation(block, kv, rope, origin, everyone, router.lockstep)
    last = max_depth
    for depth in range(max_depth):
        tokens = reached.gather(hidden)
        seen, places = block.narrow(tokens), reached.gather(positions)
        scores = router.score(seen, depth, places, reached.take(started))
        active = choose(router, scores, depth, reached, routing, longest)
        recorder.add_choice(router, scores, active, depth, reached)
        if active is not None:
            inner = compact(active, reached, kv.flat, None if bounds is None else bounds[depth])
            if inner is None and router.in_step:
                # The other ranks wait for this one at every depth.
                inner = nobody(hidden.device, flat=kv.flat)
            if inner is None:
                last = depth
                for later in range(depth, max_depth):
                    recorder.add_pass(block.narrow(hidden), later + 1)
                break
            reached, tokens, scores = reached.then(inner), inner.gather(tokens), scores.take(inner)
            if propagation is not None:
                propagation.note(hidden, depths, depth, reached)
        here = (reached.gather(rope[0]), reached.gather(rope[1]))
        start = reached.gather(origin) if block.needs_origin else tokens
        output = block.recurse(tokens, depth, here, kv.depth(depth, reached.packing), start)
        updated = router.update(tokens, output, start, scores, depth)
        ran = torch.full(tokens.shape[:2], depth + 1, device=hidden.device)
        hidden, depths = reached.scatter(hidden, updated), reached.scatter(depths, ran)
        recorder.add_pass(block.narrow(hidden), depth + 1)
    if propagation is not None and last < block.config.num_recursions:
        propagation.note(hidden, depths, last, None)
    return hidden, depths if everyone.valid is None else depths * everyone.valid


def choose(
    router: Router,
    scores: Scores,
    depth: int,
    reached: Reached,
    routing: Routing,
    longest: int | None = None,
) -> Tensor | None:
    """Which candidates run ``depth``: a mask [A, M], ascending indices [A, k], or None for all."""
    if routing == "full":
        return None
    if routing == "causal":
        return router.decide(scores, depth)
    return select(router, scores, depth, reached, longest)


def select(
    router: Router, scores: Scores, depth: int, reached: Reached, longest: int | None = None
) -> Tensor | None:
    """Training's rule, which thinks in rows: tokens laid end to end are shown to it as rows.

    Args:
        router: what chooses.
        scores: [A, M] of the candidates.
        depth: 0-based.
        reached: the candidates.
        longest: no row has more of them, and nobody asks how many; None to ask.

    Returns:
        As :meth:`Router.select <mor.model.routers.base.Router.select>`.
    """
    if reached.row_of is None or router.ignores_rows:
        return router.select(scores, depth, reached.candidates())
    laid = Segments.of(reached.row_of) if longest is None else reached.runs(longest)
    candidates = reached.candidates_in_rows(laid)
    shown = scores.map(lambda values: laid.pad(values[0]))
    active = router.select(shown, depth, candidates)
    if active is None:
        return None
    real = candidates.valid
    assert real is not None
    return laid.unpad(as_mask(active, real.float(), real))[None]


def bound_sizes(
    router: Router, started: Scores | None, layout: Layout, routing: Routing, max_depth: int
) -> list[int] | None:
    """How many tokens can run each depth, where the host would wait if it asked; else None.

    With them training lays tokens end to end in so many places, and nobody asks how many there are.
    Where padding or documents part the tokens, they have been asked about at the door, and from
    their lengths a router that selects within rows knows the rest. Ranks that share a quantile ask
    at each depth, since how much of it falls to one of them nobody can know.
    """
    positions, kv = layout.positions, layout.kv
    if routing != "topk" or not kv.flat or planned.may_ask(positions.device):
        return None
    lengths = [positions.numel()] if router.ignores_rows else kv.run_lengths
    # Without lengths all rows are equally long, and indices say how many.
    if lengths is None or not router.config.is_causal:
        return None
    return router.bounds(started, lengths, max_depth)


def compact(
    active: Tensor, reached: Reached, flat: bool, most: int | None = None
) -> Packing | None:
    """Packing of the active candidates within all candidates; None where there are none.

    Args:
        active: bool mask [A, M], or ascending indices [A, k].
        reached: the candidates [A, M].
        flat: lay them end to end, rather than in padded rows.
        most: so many are active at most, and nobody asks how many; None to ask.
    """
    if active.dtype == torch.long:
        return pack_indices(active, reached.shape[1])
    active = active if reached.valid is None else active & reached.valid
    if most is not None:
        return pack_within(active, min(most, active.numel())) if most else None
    return pack_flat(active) if flat else pack(active)
