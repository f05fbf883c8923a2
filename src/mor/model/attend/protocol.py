"""What a layer asks of attention (``Attend``), and the stages of where keys lie (``KV``)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from mor.ops.compaction import Packing
from mor.ops.native import Ragged


class Attend(Protocol):
    """Where keys and values live, and how queries meet them, for one stage of one forward pass.

    Training, the Hugging Face cache and the paged engine each bring their own.
    """

    def needs_kv(self, layer: int) -> bool | int:
        """Whether unrolled layer ``layer`` of this stage has to compute keys and values.

        A number (not a bool) says: for that many tokens, the first ones of a run [1, M].
        """
        ...

    def pages(self) -> tuple[Ragged, int] | None:
        """Where keys and values lie in pages, for kernels that run a stage's layers in one call.

        Returns:
            The tokens' pages, and the page table's layer that is layer 0 of this stage. None where
            there are no pages, or where layers have to run one by one.
        """
        return None

    def __call__(
        self, layer: int, query: Tensor, key: Tensor | None, value: Tensor | None
    ) -> Tensor:
        """Attention output [A, H, M, d] for query [A, H, M, d]; key, value [A, Hkv, M, d]."""
        ...


class KV(Protocol):
    """Where a forward pass keeps keys and values: one :class:`Attend` per stage and depth.

    Attributes:
        flat: whether active tokens may be laid end to end (:func:`mor.ops.compaction.pack_flat`)
            rather than in padded rows.
    """

    flat: bool

    @property
    def run_lengths(self) -> Sequence[int] | None:
        """Tokens of each run that is laid end to end, where the host knows them; else None."""
        return None

    def prelude(self) -> Attend:
        """Attention of the prelude's layers, over all tokens."""
        ...

    def depth(self, depth: int, packing: Packing | None) -> Attend:
        """Attention of recursion ``depth``, over the tokens of ``packing`` (None for all)."""
        ...

    def publish(
        self, entries: list[tuple[Tensor, Tensor]], depth: int, packing: Packing | None
    ) -> None:
        """Let all see, from recursion ``depth`` on, tokens that run it no more (``propagate``).

        Args:
            entries: key and value, each [A, Hkv, M, d], of the tokens, by layer of the block.
            depth: 0-based.
            packing: the tokens; None for all, where those that do run have entries too.
        """
        raise NotImplementedError

    def coda(self) -> Attend:
        """Attention of the coda's layers, over all tokens."""
        ...

    def finish(self) -> None:
        """Note that the forward pass is over."""
        ...
