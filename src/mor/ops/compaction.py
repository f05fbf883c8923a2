"""Compaction: bring the active tokens of a batch together, so that k of T tokens cost k, and back.

Two layouts. **Laid end to end** (:func:`pack_flat`): all active tokens of all rows in one run, no
padding; attention has to know where rows end (:mod:`mor.ops.segments`). **Rows**
(:func:`pack`): each row's active tokens at its front, as wide as the longest row; plain causal
attention needs no mask. Its spare places are filled with other, inactive tokens of the same row,
each once: no index occurs twice, all values are real numbers, and nothing real can see them. Rows
of equal length (:func:`pack_indices`) are both. (MoR's own gather/scatter, paper section 2.2, made
safe for rows of unequal length.)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Packing:
    """Which tokens of a batch [B, N] run together, as shorter rows [A, M].

    Attributes:
        flat: [A, M] index into the B * N tokens; each token at most once.
        rows: [A] the batch row of each packed row, or None when all B rows take part in order.
        lengths: [A] active tokens per packed row, or None when all M places are active.
        row_of: [M] batch row of each token where they are laid end to end (A = 1), else None.
    """

    flat: Tensor
    rows: Tensor | None = None
    lengths: Tensor | None = None
    row_of: Tensor | None = None

    @property
    def valid(self) -> Tensor | None:
        """[A, M] which places hold an active token; None when all do."""
        if self.lengths is None:
            return None
        places = torch.arange(self.flat.shape[1], device=self.flat.device)
        return places < self.lengths[:, None]

    def gather(self, tokens: Tensor) -> Tensor:
        """[B, N, ...] -> [A, M, ...]."""
        taken = tokens.flatten(0, 1).index_select(0, self.flat.flatten())
        return taken.unflatten(0, self.flat.shape)

    def scatter(self, tokens: Tensor, packed: Tensor) -> Tensor:
        """Copy of ``tokens`` [B, N, ...] with the active places of ``packed`` written back."""
        if (valid := self.valid) is not None:
            shape = valid.shape + (1,) * (packed.dim() - 2)
            packed = torch.where(valid.view(shape), packed, self.gather(tokens))
        written = tokens.flatten(0, 1).index_copy(0, self.flat.flatten(), packed.flatten(0, 1))
        return written.view_as(tokens)

    def then(self, inner: Packing) -> Packing:
        """The packing ``inner`` of this one's rows, seen from the batch this one packs."""
        flat = self.flat.flatten()[inner.flat]
        rows, row_of = self.rows, inner.row_of
        if self.row_of is not None:
            row_of = self.row_of[inner.flat[0]]
        elif inner.rows is not None:
            rows = inner.rows if rows is None else rows[inner.rows]
        return Packing(flat, rows, inner.lengths, row_of)


def pack(active: Tensor) -> Packing | None:
    """Packing of the tokens where ``active`` [B, N] (bool) holds, in order.

    Rows without any active token are dropped. Returns None when no token is active.
    """
    counts = active.sum(1)
    longest, shortest = (int(c) for c in torch.stack((counts.max(), counts.min())).tolist())
    if longest == 0:
        return None
    width = active.shape[1]
    order = (~active).to(torch.uint8).argsort(dim=1, stable=True)[:, :longest]
    base = torch.arange(active.shape[0], device=active.device) * width
    flat, rows = order + base[:, None], None
    if shortest == 0:
        rows = counts.nonzero().flatten()
        flat, counts = flat[rows], counts[rows]
    return Packing(flat, rows, None if shortest == longest else counts)


def pack_flat(active: Tensor) -> Packing | None:
    """The tokens where ``active`` [B, N] (bool) holds, laid end to end, row by row, in order.

    Returns None when no token is active.
    """
    flat = active.flatten().nonzero().flatten()
    if not flat.numel():
        return None
    return Packing(flat[None], row_of=flat // active.shape[1])


def pack_within(active: Tensor, most: int) -> Packing:
    """:func:`pack_flat` that does not ask how many tokens are active: at most so many.

    Spare places behind them hold other tokens, each once, which nothing real sees.

    Args:
        active: [B, N] bool.
        most: at least as many as are active, and at most B * N.
    """
    every = active.flatten()
    flat = (~every).to(torch.uint8).argsort(stable=True)[:most]
    return Packing(flat[None], lengths=every.sum()[None], row_of=flat // active.shape[1])


def pack_indices(index: Tensor, width: int) -> Packing:
    """Packing from ascending token indices [B, k] into rows of ``width`` tokens, all active."""
    base = torch.arange(index.shape[0], device=index.device) * width
    return Packing(index + base[:, None])


def nobody(device: torch.device, *, flat: bool) -> Packing:
    """Packing of no token: one spare place, the first candidate's, which nothing reads or writes.

    A block that runs over it does its part of what ranks do together, and its weights get a
    gradient of zero instead of none.

    Args:
        device: of the tokens.
        flat: laid end to end, rather than in rows.
    """
    zero = torch.zeros(1, dtype=torch.long, device=device)
    return Packing(zero[:, None], None if flat else zero, zero, zero if flat else None)
