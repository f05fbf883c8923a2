"""How the rows of a batch lie in the tokens that the stages run over: as rows, or end to end."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mor.ops.compaction import Packing


@dataclass(frozen=True)
class Rows:
    """How the B rows of a batch lie in the tokens [B, N] (or [1, N]) of the recursion stage.

    Attributes:
        width: tokens per row where all rows are equally long.
        lengths: [rows] real tokens per row, front-packed or end to end; None when all are real.
        row_of: [N] which row each token belongs to, ascending, where rows (or documents, which are
            rows to all that follows) are laid end to end and hidden is [1, N, D]; else None.
    """

    width: int
    lengths: Tensor | None = None
    row_of: Tensor | None = None

    def begin(self, inner: Packing) -> Packing:
        """The first packing of these tokens, told which batch row each of them belongs to."""
        if self.row_of is None:
            return inner
        return replace(inner, row_of=self.row_of[inner.flat.flatten()])

    def valid(self, hidden: Tensor) -> Tensor | None:
        """[B, N] which places are real; None when all are."""
        if self.lengths is None or self.row_of is not None:
            return None
        places = torch.arange(hidden.shape[1], device=hidden.device)
        return places < self.lengths[:, None]

    def total(self, hidden: Tensor) -> Tensor | int:
        """Real tokens of the batch."""
        if self.lengths is None or self.row_of is not None:
            return hidden.shape[0] * hidden.shape[1]
        return self.lengths.sum()


def front(real: Tensor) -> Packing:
    """Packing of ``real`` [B, T] that keeps every row, empty ones too: a cache has a place each."""
    order = (~real).to(torch.uint8).argsort(dim=1, stable=True)
    counts = real.sum(1)
    base = torch.arange(len(real), device=real.device)[:, None] * real.shape[1]
    return Packing(order[:, : max(1, int(counts.max()))] + base, None, counts)


def to_front(
    hidden: Tensor, positions: Tensor | None, packing: Packing | None, seen: Tensor
) -> tuple[Tensor, Tensor, Rows]:
    """Stream, positions and rows with each row's real tokens at its front, for a cache."""
    lengths = None
    if packing is not None:
        assert packing.valid is not None
        lengths = packing.lengths
        # Zeros: attention weighs what it hides with 0, and 0 x nan would still be nan.
        hidden = packing.gather(hidden).masked_fill(~packing.valid[..., None], 0.0)
        positions = None if positions is None else packing.gather(positions)
    if positions is None:
        positions = torch.arange(hidden.shape[1], device=hidden.device) + seen[:, None]
    return hidden, positions, Rows(hidden.shape[1], lengths)


def end_to_end(
    hidden: Tensor, positions: Tensor | None, packing: Packing | None, runs: Tensor | None
) -> tuple[Tensor, Tensor, Rows]:
    """Stream, positions and rows: one run [1, N] where there is padding or where documents part."""
    batch, width = hidden.shape[:2]
    if positions is None:
        positions = torch.arange(width, device=hidden.device).expand(batch, -1)
        if packing is not None:
            counts = torch.zeros(batch * width, dtype=torch.long, device=hidden.device)
            counts[packing.flat[0]] = 1
            positions = counts.view(batch, width).cumsum(1) - 1
    if packing is None and runs is None:
        return hidden, positions, Rows(width)
    if packing is None:
        hidden, positions, row_of = hidden.flatten(0, 1)[None], positions.flatten()[None], runs
    else:
        hidden, positions = packing.gather(hidden), packing.gather(positions)
        row_of = packing.row_of if runs is None else runs[packing.flat[0]]
    assert row_of is not None
    return hidden, positions, Rows(width, torch.bincount(row_of), row_of)


def document_runs(document_ids: Tensor) -> Tensor:
    """[B T] one number per document of the batch, ascending, from numbers within rows [B, T]."""
    begins = torch.ones_like(document_ids, dtype=torch.bool)
    begins[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
    return begins.flatten().cumsum(0) - 1
