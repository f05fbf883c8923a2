"""``kv_sharing="propagate"``: tokens that left stay visible to deeper passes, as they ended.

A token that runs no pass at some depth is seen there with keys and values of its final state: what
would enter the pass goes through the norm and the two projections of every layer of the block, and
no layer is run. It is CALM's state propagation (arXiv 2207.07061), for depths that are recursions.
So what a token found in its last pass can be looked up by all that go deeper.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn

from mor.config import MoRConfig
from mor.model.attend.protocol import KV
from mor.model.layers import DecoderLayer
from mor.model.reached import Reached
from mor.model.relaxation import DepthEmbedding
from mor.model.seam import Seam
from mor.ops import planned
from mor.ops.compaction import pack, pack_flat
from mor.ops.rope import Rotation

Entries = list[tuple[Tensor, Tensor]]
"""Key and value, each [A, Hkv, M, d], by layer of the block."""


class Source(Protocol):
    """What this room needs of the network; see :class:`mor.model.model.MoRModel`."""

    config: MoRConfig
    block: nn.ModuleList
    seam: Seam | None
    depth_embedding: DepthEmbedding | None


def make_entries(
    model: Source,
    hidden: Tensor,
    depth: int | Tensor,
    rope: Rotation,
    origin: Tensor | None = None,
) -> Entries:
    """Keys and values that tokens which run no pass at ``depth`` are seen by there.

    Args:
        model: whose block it is.
        hidden, depth, rope, origin: as of :meth:`mor.model.model.MoRModel.recurse`.
    """
    if model.seam is not None:
        hidden = model.seam.enter(hidden, origin, depth)
    if model.depth_embedding is not None:
        hidden = model.depth_embedding(hidden, depth)
    layers = [layer for layer in model.block if isinstance(layer, DecoderLayer)]
    return [layer.enter_kv(hidden, rope, depth) for layer in layers]


class Propagation:
    """Tells keys and values of a forward pass who left, and with what.

    Args:
        model: whose block it is.
        kv: where keys and values are kept.
        rope: rotation of all tokens, each [A, N, head_dim].
        origin: [A, N, W] what is carried before depth 0.
        everyone: the tokens [A, N].
        lockstep: whether other ranks do the same at every depth, whoever left here.
    """

    def __init__(
        self,
        model: Source,
        kv: KV,
        rope: Rotation,
        origin: Tensor,
        everyone: Reached,
        lockstep: bool = False,
    ) -> None:
        self.model, self.kv, self.rope, self.origin = model, kv, rope, origin
        self.everyone = everyone
        # Who left is then not asked: all are told of, those that go on too, and the entries of
        # these are replaced by those of the pass.
        self.whole = kv.flat and (lockstep or not planned.may_ask(origin.device))

    def note(self, hidden: Tensor, depths: Tensor, depth: int, going: Reached | None) -> None:
        """Tokens ran their last pass, or none: the others will see them from ``depth`` on.

        Args:
            hidden: [A, N, W] what is carried.
            depths: [A, N] passes that each token ran.
            depth: 0-based, the next one.
            going: who runs it; None where nobody does.
        """
        if going is None and self.kv.flat:
            return  # nobody is left who could see them, and nothing is kept
        if self.whole:
            last = self.model.config.num_recursions - 1
            entries = make_entries(
                self.model, hidden, depths.clamp(max=last), self.rope, self.origin
            )
            self.kv.publish(entries, depth, None)
            return
        left = depths == depth
        if going is not None:
            left &= ~going.scatter(
                torch.zeros_like(left),
                torch.ones(going.shape, dtype=torch.bool, device=left.device),
            )
        if self.everyone.valid is not None:
            left &= self.everyone.valid
        packing = pack_flat(left) if self.kv.flat else pack(left)
        if packing is None:
            return
        rope = (packing.gather(self.rope[0]), packing.gather(self.rope[1]))
        origin = packing.gather(self.origin)
        entries = make_entries(self.model, packing.gather(hidden), depth, rope, origin)
        self.kv.publish(entries, depth, packing)
