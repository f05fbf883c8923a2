"""The recursion stage over a batch: route, compact, run the block, update, scatter back.

One loop serves every router, training and decoding alike. What decides is ``router.decide`` under
causal routing and ``router.select`` otherwise.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mor.model.kv import KV
from mor.model.layers import Attend
from mor.model.router_base import Router, Scores
from mor.model.routers import as_mask
from mor.ops.compaction import Packing, pack, pack_indices
from mor.ops.rope import Rotation

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
    lengths: Tensor | None,
    kv: KV,
    *,
    causal: bool,
    max_depth: int,
    with_losses: bool = False,
    keep_states: bool = False,
    keep_traces: bool = False,
) -> RecursionOutput:
    """Run up to ``max_depth`` recursions over front-packed rows.

    Args:
        block: ``recurse`` of the model.
        router: what chooses depth.
        hidden: [B, N, D] the stream after the prelude.
        rope: rotation of all tokens, each [B, N, head_dim].
        positions: [B, N].
        lengths: [B] real tokens per row, None when all N are.
        kv: where keys and values live.
        causal: use ``decide`` instead of ``select``.
        max_depth: depth cap, at most R.
        with_losses: compute the router's losses and let it observe the batch.
        keep_states, keep_traces: fill the fields of the same name.
    """
    batch, width = hidden.shape[:2]
    origin, packing = hidden, None
    result = RecursionOutput(hidden, torch.zeros_like(positions))
    valid = None
    if lengths is not None:
        valid = torch.arange(width, device=hidden.device) < lengths[:, None]
    total = batch * width if lengths is None else lengths.sum()
    started = router.start(hidden, max_depth)
    candidates_valid = valid
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
            row_lengths = width if lengths is None else lengths
            if lengths is not None and packing is not None and packing.rows is not None:
                row_lengths = lengths[packing.rows]
            active = router.select(scores, depth, candidates_valid, row_lengths, total)
        if with_losses:
            if not router.frozen:
                router.observe(scores, active, depth, candidates_valid)
            for name, term in router.losses(scores, active, depth, candidates_valid).items():
                result.losses[name] = result.losses.get(name, 0) + term
        if keep_traces:
            like = torch.empty(tokens.shape[:2], device=tokens.device)
            trace = DepthTrace(scores, packing, as_mask(active, like, candidates_valid))
            result.traces.append(trace)
        if active is not None:
            inner = _inner_packing(active, candidates_valid, tokens.shape[1])
            if inner is None:
                if keep_states:
                    result.states += [hidden] * (max_depth - depth)
                break
            packing = inner if packing is None else packing.then(inner)
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


def _inner_packing(active: Tensor, valid: Tensor | None, width: int) -> Packing | None:
    """Packing of the active candidates; None where there are none."""
    if active.dtype == torch.long:
        return pack_indices(active, width)
    return pack(active if valid is None else active & valid)
