"""The recursion stage over a batch: route, compact, run the block, update, scatter back.

One loop serves every router, training and decoding alike. What decides is ``router.decide`` under
causal routing and ``router.select`` otherwise.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mor.model.attend.rows import KV
from mor.model.layers import Attend
from mor.model.layout import Rows
from mor.model.routers import as_mask
from mor.model.routers.base import Router, Scores
from mor.ops.compaction import Packing, nobody, pack, pack_flat, pack_indices
from mor.ops.rope import Rotation
from mor.ops.segments import Segments

Block = Callable[[Tensor, int, Rotation, Attend], Tensor]


@dataclass
class DepthTrace:
    """What happened at one depth: kept on request, for tests and analysis.

    Attributes:
        scores: of the candidates.
        candidates: their packing within the batch (None: all tokens).
        active: bool mask over the candidates that ran this depth.
    """

    scores: Scores
    candidates: Packing | None
    active: Tensor


@dataclass
class RecursionOutput:
    """Result of the recursion stage.

    Attributes:
        hidden: [B, N, D] after the last recursion of each token.
        depths: [B, N] how many recursions each token ran.
        losses: router loss terms by name, summed over depths, not weighted.
        states: stream after each depth, where asked for.
        traces: one per depth that was reached, where asked for.
    """

    hidden: Tensor
    depths: Tensor
    losses: dict[str, Tensor] = field(default_factory=dict)
    states: list[Tensor] = field(default_factory=list)
    traces: list[DepthTrace] = field(default_factory=list)


def _gather(packing: Packing | None, tokens: Tensor) -> Tensor:
    return tokens if packing is None else packing.gather(tokens)


def run_recursions(
    block: Block,
    router: Router,
    hidden: Tensor,
    rope: Rotation,
    positions: Tensor,
    rows: Rows,
    kv: KV,
    *,
    causal: bool,
    max_depth: int,
    with_losses: bool = False,
    keep_states: bool = False,
    keep_traces: bool = False,
) -> RecursionOutput:
    """Run up to ``max_depth`` recursions over the tokens of some rows.

    Args:
        block: ``recurse`` of the model.
        router: what chooses depth.
        hidden: [B, N, D] the stream after the prelude.
        rope: rotation of all tokens, each [B, N, head_dim].
        positions: [B, N].
        rows: how the batch's rows lie in [B, N].
        kv: where keys and values live.
        causal: use ``decide`` instead of ``select``.
        max_depth: depth cap, at most R.
        with_losses: compute the router's losses and let it observe the batch.
        keep_states, keep_traces: fill the fields of the same name.
    """
    origin, packing = hidden, None
    result = RecursionOutput(hidden, torch.zeros_like(positions))
    valid = candidates_valid = rows.valid(hidden)
    total = rows.total(hidden)
    started = router.start(hidden, max_depth)
    for depth in range(max_depth):
        tokens = _gather(packing, hidden)
        scores = router.score(
            tokens,
            depth,
            _gather(packing, positions),
            started if started is None or packing is None else started.take(packing),
        )
        if causal:
            active = router.decide(scores, depth)
        else:
            active = _select(router, scores, depth, candidates_valid, rows, packing, total)
        if with_losses:
            if not router.frozen:
                router.observe(scores, active, depth, candidates_valid)
            for name, term in router.losses(scores, active, depth, candidates_valid).items():
                result.losses[name] = result.losses.get(name, 0) + term
        if keep_traces:
            like = torch.empty(tokens.shape[:2], device=tokens.device)
            # Cut off: DDP would take what is returned for a way to the loss.
            mask = as_mask(active, like, candidates_valid)
            trace = DepthTrace(scores.detach(), packing, mask)
            result.traces.append(trace)
        if active is not None:
            inner = _inner_packing(active, candidates_valid, tokens.shape[1], kv.flat)
            if inner is None and router.in_step:
                # The other ranks wait for this one at every depth.
                inner = nobody(hidden.device, flat=kv.flat)
            if inner is None:
                if keep_states:
                    result.states += [hidden] * (max_depth - depth)
                break
            packing = rows.begin(inner) if packing is None else packing.then(inner)
            candidates_valid = packing.valid
            tokens, scores = inner.gather(tokens), scores.take(inner)
        here = rope if packing is None else (packing.gather(rope[0]), packing.gather(rope[1]))
        output = block(tokens, depth, here, kv.depth(depth, packing))
        start = _gather(packing, origin) if router.returns_to_origin else tokens
        updated = router.update(tokens, output, start, scores, depth)
        ran = torch.full(tokens.shape[:2], depth + 1, device=hidden.device)
        if packing is None:
            hidden, result.depths = updated, ran
        else:
            hidden = packing.scatter(hidden, updated)
            result.depths = packing.scatter(result.depths, ran)
        if keep_states:
            result.states.append(hidden)
    result.hidden = hidden
    if valid is not None:
        result.depths = result.depths * valid
    return result


def _select(
    router: Router,
    scores: Scores,
    depth: int,
    valid: Tensor | None,
    rows: Rows,
    packing: Packing | None,
    total: Tensor | int,
) -> Tensor | None:
    """Training's rule, which thinks in rows: candidates laid end to end are shown to it as such."""
    row_of = rows.row_of if packing is None else packing.row_of
    if row_of is None:
        lengths = rows.lengths
        if lengths is not None and packing is not None and packing.rows is not None:
            lengths = lengths[packing.rows]
        return router.select(
            scores, depth, valid, rows.width if lengths is None else lengths, total
        )
    segments = Segments.of(row_of)
    names = torch.tensor(segments.names, device=row_of.device)
    real = segments.table[1]
    lengths = torch.full_like(names, rows.width) if rows.lengths is None else rows.lengths[names]
    shown = scores.map(lambda values: segments.pad(values[0]))
    if valid is not None:  # a place that only keeps step
        real = real & segments.pad(valid[0])
    active = router.select(shown, depth, real, lengths, total)
    return None if active is None else segments.unpad(as_mask(active, real.float(), real))[None]


def _inner_packing(active: Tensor, valid: Tensor | None, width: int, flat: bool) -> Packing | None:
    """Packing of the active candidates; None where there are none."""
    if active.dtype == torch.long:
        return pack_indices(active, width)
    active = active if valid is None else active & valid
    return pack_flat(active) if flat else pack(active)
