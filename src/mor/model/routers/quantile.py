"""The boundary of a batch that lies on several ranks, exact, in messages of fixed size.

Gathering all scores would send more with every rank. A radix selection sends counts instead: 2,048
of them per 11 bits of the number, whatever the batch and the number of ranks.
"""

from __future__ import annotations

import torch
from torch import Tensor

_DIGIT = 11
_INTEGER = {4: torch.int32, 8: torch.int64}


def _ordered(values: Tensor) -> Tensor:
    """Int64 that compare as these floating-point numbers do (IEEE 754: sign and magnitude)."""
    kind = _INTEGER[values.element_size()]
    bits = (values + 0.0).view(kind)  # -0.0 becomes 0.0
    return torch.where(bits < 0, bits ^ torch.iinfo(kind).max, bits).long()


def _number(key: Tensor, dtype: torch.dtype) -> Tensor:
    """The number whose :func:`_ordered` is ``key``; a scalar."""
    kind = _INTEGER[dtype.itemsize]
    key = key.to(kind)
    return torch.where(key < 0, key ^ torch.iinfo(kind).max, key).view(dtype)


def boundary_over_ranks(values: Tensor, kept: Tensor, valid: Tensor | None) -> Tensor:
    """Midway between the ``kept``-th and the next largest value of all ranks; a scalar.

    What :func:`~mor.model.routers.selection.batch_boundary` gives for the values of all ranks in
    one tensor, bit for bit. Every rank has to call it, with any number of values, also none.

    Args:
        values: of this rank, float32 or float64.
        kept: over all ranks, int64.
        valid: shaped as ``values``, which of them count; None for all.
    """
    values = values.flatten()
    alive = torch.ones_like(values, dtype=torch.bool) if valid is None else valid.flatten()
    keys = _ordered(values)
    real, rank = alive, kept.clamp(min=1)
    key = above = equal = torch.zeros((), dtype=torch.long, device=values.device)
    number = equal
    bits = 8 * values.element_size()
    for high in range(bits, 0, -_DIGIT):
        low = max(0, high - _DIGIT)
        size = 1 << (high - low)
        offset = size // 2 if high == bits else 0  # the leading digit carries the sign
        digit = ((keys >> low) + offset) & (size - 1)
        counts = torch.zeros(size, dtype=torch.long, device=values.device)
        counts.scatter_add_(0, digit, alive.long())
        torch.distributed.all_reduce(counts)
        downwards = counts.flip(0)
        reached = downwards.cumsum(0)
        if high == bits:
            number = reached[-1]
        place = (reached < rank - above).sum().clamp(max=size - 1)
        # Taken, not indexed: an index of one number would become the host's, which waits for it.
        equal = downwards.take(place)
        above = above + reached.take(place) - equal
        chosen = size - 1 - place
        alive = alive & (digit == chosen)
        key = (key << (high - low)) + chosen - offset
    last_in = _number(key, values.dtype)
    rest = real & (keys < key)
    below = values.masked_fill(~rest, -torch.inf)
    below = torch.cat((below, below.new_full((1,), -torch.inf))).max()
    torch.distributed.all_reduce(below, torch.distributed.ReduceOp.MAX)
    # Equal values stand on both sides of the boundary; with none kept it is the largest.
    first_out = torch.where((above + equal > kept) | (kept < 1), last_in, below)
    boundary = torch.where(kept >= number, last_in - 1e-3, last_in / 2 + first_out / 2)
    return torch.where(number > 0, boundary, -torch.inf)
