"""How selections are made and written down: top-k per row, a boundary per batch, masks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def top_k_rows(
    values: Tensor, capacity: float, valid: Tensor | None, lengths: Tensor | int
) -> Tensor | None:
    """The ``max(1, trunc(capacity x length))`` largest values of each row (paper's rule).

    Of equal values (repeated tokens, where no layer has mixed them yet) the earlier ones win.

    Args:
        values: [A, M] candidates. valid: [A, M] or None. lengths: [A] or one number.

    Returns:
        Ascending indices [A, k] where all rows keep equally many, else a bool mask [A, M];
        None where all candidates stay.
    """
    if capacity >= 1:
        return None
    if valid is None and isinstance(lengths, int):
        kept = max(1, int(capacity * lengths))
        if kept >= values.shape[1]:
            return None
        best = values.argsort(dim=1, descending=True, stable=True)[:, :kept]
        return best.sort(dim=1).values
    if isinstance(lengths, int):
        lengths = torch.full(values.shape[:1], lengths, device=values.device)
    if valid is not None:
        values = values.masked_fill(~valid, -torch.inf)
    kept_of_row = (capacity * lengths.double()).long().clamp(min=1)
    rank = values.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    mask = rank < kept_of_row[:, None]
    return mask if valid is None else mask & valid


def count_top_k(capacities: Sequence[float], lengths: Sequence[int]) -> list[int]:
    """How many tokens :func:`top_k_rows` keeps at each depth, one after the other, in all rows.

    Args:
        capacities: of the depths. lengths: tokens of each row.
    """
    left, counts = list(lengths), []
    for capacity in capacities:
        if capacity < 1:
            kept = (max(1, int(capacity * length)) for length in lengths)
            left = [min(pair) for pair in zip(left, kept, strict=True)]
        counts.append(sum(left))
    return counts


def batch_boundary(values: Tensor, kept: Tensor, valid: Tensor | None) -> Tensor:
    """Midway between the ``kept``-th and the next largest of the valid values; a scalar."""
    if valid is not None:
        values = values.masked_fill(~valid, -torch.inf)
    ordered = values.flatten().sort(descending=True).values
    # Taken, not indexed: an index of one number would become the host's, which waits for it.
    last_in = ordered.take((kept - 1).clamp(min=0))
    first_out = ordered.take(kept.clamp(max=ordered.numel() - 1))
    # Where nothing is left out there is no next value: stay just below the last one let in.
    missing = torch.isinf(first_out) | (kept >= ordered.numel())
    return torch.where(missing, last_in - 1e-3, last_in / 2 + first_out / 2)


def as_mask(active: Tensor | None, like: Tensor, valid: Tensor | None) -> Tensor:
    """Any answer of ``select`` or ``decide`` as a bool mask shaped as ``like`` [A, M]."""
    if active is None:
        mask = torch.ones_like(like, dtype=torch.bool)
    elif active.dtype == torch.bool:
        mask = active
    else:
        mask = torch.zeros_like(like, dtype=torch.bool).scatter(1, active, True)
    return mask if valid is None else mask & valid


def masked_mean(values: Tensor, valid: Tensor | None) -> Tensor:
    """Mean over the valid entries."""
    if valid is None:
        return values.mean()
    return torch.where(valid, values, 0.0).sum() / valid.sum().clamp(min=1)
