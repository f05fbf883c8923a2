"""What each pass is worth: NLL and accuracy, and the tokens that it put right or spoiled."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mor.eval.passes import PassResult


def score_passes(capped: Sequence[PassResult]) -> list[dict[str, Any]]:
    """One row per depth cap 1..R, in order.

    Args:
        capped: the same sequences at depth caps 1..R, with ``hits`` kept.

    Returns:
        ``max_depth``, ``nll`` (nats per token), ``accuracy`` (share of tokens whose most likely
        token was the right one), and from the second row on ``fixed`` and ``broke``: tokens that
        are right here and were wrong one pass earlier, and the other way round.
    """
    rows: list[dict[str, Any]] = []
    for cap, result in enumerate(capped, 1):
        hits = result.hits
        row = {"max_depth": cap, "nll": result.nll, "accuracy": float(hits.double().mean())}
        if cap > 1:
            row |= count_changes(capped[cap - 2].hits, hits)
        rows.append(row)
    return rows


def count_changes(before: Any, hits: Any) -> dict[str, int]:
    """How many of [N] answers a pass ``fixed`` and ``broke``; bool tensors or arrays."""
    return {"fixed": int((hits & ~before).sum()), "broke": int((before & ~hits).sum())}
