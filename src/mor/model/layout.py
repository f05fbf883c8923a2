"""How a batch [B, T] is laid for the stages, and how their results are brought back.

The stages run over tokens [A, N] that are all real, or real at the front of each row:

- without a cache, padding leaves by laying the real tokens end to end, in one run [1, N]. Documents
  become rows of their own in that run;
- with a cache, each row's real tokens move to its front, [B, N];
- a batch without padding, documents or cache stays as it is;
- a traced graph (``torch.export``) keeps padding where it is: its shapes cannot depend on a mask.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mor.config import MoRConfig
from mor.model.attend.among import PaddedAttend
from mor.model.attend.cached import CacheKV
from mor.model.attend.protocol import KV
from mor.model.attend.rows import RowKV
from mor.model.cache import DepthCache
from mor.ops.compaction import Packing, pack_flat


@dataclass(frozen=True)
class Rows:
    """How the rows of a batch lie in the tokens [A, N] of the recursion stage.

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
        """The first packing of these tokens, with the batch row of each of its tokens."""
        if self.row_of is None:
            return inner
        return replace(inner, row_of=self.row_of[inner.flat.flatten()])

    def valid(self, hidden: Tensor) -> Tensor | None:
        """[A, N] which places of hidden [A, N, D] are real; None when all are."""
        if self.lengths is None or self.row_of is not None:
            return None
        places = torch.arange(hidden.shape[1], device=hidden.device)
        return places < self.lengths[:, None]

    def total(self, hidden: Tensor) -> Tensor | int:
        """Real tokens of hidden [A, N, D]."""
        if self.lengths is None or self.row_of is not None:
            return hidden.shape[0] * hidden.shape[1]
        return self.lengths.sum()


@dataclass(frozen=True)
class Layout:
    """One batch [B, T], laid for the stages.

    Attributes:
        shape: B and T.
        positions: [A, N] position of each token within its row or document.
        rows: how the batch's rows lie in [A, N].
        kv: where the stages keep keys and values.
        packing: from the batch to [A, N], where padding left; else None.
        real: [B, T] bool, where padding stays; else None.
    """

    shape: tuple[int, int]
    positions: Tensor
    rows: Rows
    kv: KV
    packing: Packing | None = None
    real: Tensor | None = None

    @classmethod
    def of(
        cls,
        config: MoRConfig,
        tokens: Tensor,
        mask: Tensor | None = None,
        documents: Tensor | None = None,
        cache: DepthCache | None = None,
        positions: Tensor | None = None,
    ) -> Layout | None:
        """The layout of a batch; None where it is padding and nothing else, or nothing at all.

        Args:
            config: the model's.
            tokens: [B, T, ...]; only the shape and the device are looked at.
            mask: [B, T'] with T' >= T, 1 for real tokens; the last T columns count.
            documents: [B, T] which document of its row a token belongs to.
            cache: keys and values of earlier calls.
            positions: [B, T]; default counts the real tokens of each row or document.

        Raises:
            ValueError: inputs of the wrong shape, documents with a cache.
        """
        batch, width = shape = tokens.shape[0], tokens.shape[1]
        if torch.compiler.is_exporting():
            _check_exportable(config, documents, cache)
            if mask is not None:
                return _lay_with_padding(config, mask[:, -width:].bool(), positions)
            return _lay_without_cache(config, tokens, None, None, positions)
        real = find_real(mask, batch, width)
        if documents is not None and documents.shape != shape:
            raise ValueError(
                f"document_ids has shape {tuple(documents.shape)}; it must be [{batch}, {width}]"
            )
        if positions is not None:
            if positions.shape not in ((width,), (1, width), shape):
                raise ValueError(
                    f"position_ids has shape {tuple(positions.shape)}; it must be "
                    f"[{batch}, {width}], or [1, {width}] for all rows"
                )
            positions = positions.long().expand(batch, -1)
        if not batch * width:
            return None
        if cache is None:
            return _lay_without_cache(config, tokens, real, documents, positions)
        if documents is not None:
            raise ValueError("document_ids cannot be given with a cache: decode one document")
        return _lay_for_cache(tokens, real, positions, cache)

    def lay(self, tokens: Tensor) -> Tensor:
        """Tokens [B, T, D] as the stages take them, [A, N, D]."""
        if self.packing is None:
            return tokens if self.rows.row_of is None else tokens.flatten(0, 1)[None]
        laid = self.packing.gather(tokens)
        valid = self.packing.valid
        # Zeros: attention weighs what it hides with 0, and 0 x nan would still be nan.
        return laid if valid is None else laid.masked_fill(~valid[..., None], 0.0)

    def restore(self, laid: Tensor) -> Tensor:
        """Results [A, N, ...] of the stages at the places of the batch [B, T, ...].

        Padding is zero.
        """
        if self.real is not None:
            return laid * self.real.view(*self.shape, *[1] * (laid.dim() - 2)).to(laid.dtype)
        if self.packing is None:
            return laid if self.rows.row_of is None else laid.view(*self.shape, *laid.shape[2:])
        return self.packing.scatter(laid.new_zeros(*self.shape, *laid.shape[2:]), laid)


def _check_exportable(
    config: MoRConfig, documents: Tensor | None, cache: DepthCache | None
) -> None:
    """Refuse what a traced graph cannot hold, in one sentence instead of torch's pages.

    Raises:
        ValueError: a routed model, documents, or a cache.
    """
    if config.is_routed:
        raise ValueError(
            f"torch.export traces one computation for all tokens, and router={config.router!r} "
            "gives each its own; only router='fixed' can be exported"
        )
    if documents is not None or cache is not None:
        raise ValueError(
            "torch.export traces a forward without document_ids and without a cache; give "
            "use_cache=False and one document a row"
        )


def _lay_with_padding(config: MoRConfig, real: Tensor, positions: Tensor | None) -> Layout:
    """The rows themselves, padding included, for a traced graph."""
    shape = real.shape[0], real.shape[1]
    if positions is None:
        positions = (real.long().cumsum(1) - 1).clamp(min=0)
    kv = RowKV(config, shape, None, PaddedAttend(real, config.is_causal))
    return Layout(shape, positions, Rows(shape[1]), kv, real=real)


def _lay_for_cache(
    tokens: Tensor, real: Tensor | None, positions: Tensor | None, cache: DepthCache
) -> Layout:
    """Each row's real tokens at its front, every row kept: the cache has a place for each."""
    batch, columns = tokens.shape[:2]
    seen = cache.prepare(batch, tokens.device)
    packing = None if real is None else _pack_front(real)
    lengths = None if packing is None else packing.lengths
    width = columns if packing is None else packing.flat.shape[1]
    if positions is None:
        positions = torch.arange(width, device=tokens.device) + seen[:, None]
    elif packing is not None:
        positions = packing.gather(positions)
    counts = torch.full_like(seen, columns) if lengths is None else lengths
    kv = CacheKV(cache, counts, width, columns)
    return Layout((batch, columns), positions, Rows(width, lengths), kv, packing)


def _pack_front(real: Tensor) -> Packing:
    """Packing of ``real`` [B, T] (bool) into rows, the empty ones included."""
    order = (~real).to(torch.uint8).argsort(dim=1, stable=True)
    counts = real.sum(1)
    base = torch.arange(len(real), device=real.device)[:, None] * real.shape[1]
    return Packing(order[:, : max(1, int(counts.max()))] + base, None, counts)


def _lay_without_cache(
    config: MoRConfig,
    tokens: Tensor,
    real: Tensor | None,
    documents: Tensor | None,
    positions: Tensor | None,
) -> Layout | None:
    """One run [1, N] where there is padding or where documents part; else the rows themselves."""
    shape = batch, width = tokens.shape[0], tokens.shape[1]
    packing = None if real is None else pack_flat(real)
    if real is not None and packing is None:
        return None
    counted = positions is None
    if positions is None:
        positions = torch.arange(width, device=tokens.device).expand(batch, -1)
        if real is not None:
            positions = real.long().cumsum(1) - 1
    runs = None if documents is None else number_documents(documents)
    if packing is not None:
        positions = packing.gather(positions)
        runs = packing.row_of if runs is None else runs[packing.flat[0]]
    elif runs is not None:
        positions = positions.flatten()[None]
    if counted and documents is not None and runs is not None:  # each begins at 0, as alone
        positions = positions - positions[:, torch.searchsorted(runs, runs)]
    lengths = None if runs is None else torch.bincount(runs)
    size = (positions.shape[0], positions.shape[1])
    return Layout(shape, positions, Rows(width, lengths, runs), RowKV(config, size, runs), packing)


def number_documents(document_ids: Tensor) -> Tensor:
    """[B T] one number per document of the batch, ascending, from numbers within rows [B, T]."""
    begins = torch.ones_like(document_ids, dtype=torch.bool)
    begins[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
    return begins.flatten().cumsum(0) - 1


def find_real(mask: Tensor | None, batch: int, width: int) -> Tensor | None:
    """bool [B, T] which tokens ``mask`` [B, T'] calls real; None where there is no padding.

    Raises:
        ValueError: another shape, or fewer columns than tokens.
    """
    if mask is None:
        return None
    shape = mask.shape
    if len(shape) != 2 or shape[0] != batch or shape[1] < width:
        raise ValueError(
            f"attention_mask has shape {tuple(shape)}; it must be "
            f"[{batch}, T] with T of at least {width}, 1 for real tokens"
        )
    real = mask[:, -width:].bool()
    return None if bool(real.all()) else real
