"""The tokens that a depth is asked about: those that ran the depth before."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mor.model.layout import Rows
from mor.model.routers.base import Candidates, Scores
from mor.ops.compaction import Packing
from mor.ops.segments import Runs, Segments


@dataclass(frozen=True)
class Reached:
    """The tokens [A, M], of a batch [B, N], that ran the depth before and may run the next one.

    Attributes:
        rows: how the batch's rows lie in [B, N].
        shape: A and M.
        device: of the tokens.
        total: real tokens of the batch.
        valid: bool [A, M] which places hold a token; None when all do.
        packing: where the tokens stand in the batch; None for all of them.
    """

    rows: Rows
    shape: tuple[int, int]
    device: torch.device
    total: Tensor | int
    valid: Tensor | None = None
    packing: Packing | None = None

    @classmethod
    def everyone(cls, rows: Rows, hidden: Tensor) -> Reached:
        """All tokens of hidden [B, N, D]: the candidates of depth 0."""
        batch, width = hidden.shape[:2]
        return cls(rows, (batch, width), hidden.device, rows.total(hidden), rows.valid(hidden))

    def then(self, inner: Packing) -> Reached:
        """Of these tokens, those of ``inner``."""
        packing = self.rows.begin(inner) if self.packing is None else self.packing.then(inner)
        shape = (packing.flat.shape[0], packing.flat.shape[1])
        return Reached(self.rows, shape, self.device, self.total, packing.valid, packing)

    def gather(self, tokens: Tensor) -> Tensor:
        """[B, N, ...] of the batch -> [A, M, ...] of these tokens."""
        return tokens if self.packing is None else self.packing.gather(tokens)

    def take(self, scores: Scores | None) -> Scores | None:
        """Scores of the batch's tokens -> scores of these."""
        return scores if scores is None or self.packing is None else scores.take(self.packing)

    def scatter(self, tokens: Tensor, packed: Tensor) -> Tensor:
        """``tokens`` [B, N, ...] of the batch with ``packed`` [A, M, ...] of these written back."""
        return packed if self.packing is None else self.packing.scatter(tokens, packed)

    @property
    def row_of(self) -> Tensor | None:
        """[M] the row that each token belongs to, where tokens are laid end to end; else None."""
        return self.rows.row_of if self.packing is None else self.packing.row_of

    def candidates(self) -> Candidates:
        """These tokens as they are laid; end to end they are one row."""
        if self.row_of is not None:
            return Candidates(self.valid, self.total, self.total)
        lengths = self.rows.lengths
        if lengths is None:
            return Candidates(self.valid, self.rows.width, self.total)
        if self.packing is not None and self.packing.rows is not None:
            lengths = lengths[self.packing.rows]
        return Candidates(self.valid, lengths, self.total)

    def runs(self, longest: int) -> Runs:
        """These tokens, laid end to end, by rows of at most ``longest``; the device knows which."""
        row_of, lengths = self.row_of, self.rows.lengths
        assert row_of is not None
        assert lengths is not None
        real = torch.ones_like(row_of, dtype=torch.bool) if self.valid is None else self.valid[0]
        return Runs(row_of, real, len(lengths), longest)

    def candidates_in_rows(self, segments: Segments | Runs) -> Candidates:
        """These tokens, laid end to end, as padded rows: one for each of ``segments``."""
        if isinstance(segments, Runs):
            assert self.rows.lengths is not None
            real = segments.pad(segments.real)
            return Candidates(real, self.rows.lengths, self.total)
        real = segments.table[1]
        names = torch.tensor(segments.names, device=real.device)
        own = self.rows.lengths
        lengths = torch.full_like(names, self.rows.width) if own is None else own[names]
        if self.valid is not None:  # a place that only keeps step
            real = real & segments.pad(self.valid[0])
        return Candidates(real, lengths, self.total)
