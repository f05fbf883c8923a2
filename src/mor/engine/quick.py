"""Where a stage can run in one call of the kernels, its bookkeeping of lanes included.

It gives what :class:`mor.engine.runner.Runner` makes step by step, which is its plain form.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn

from mor.engine.attend import PagedAttention, native_attention
from mor.engine.lanes import Lanes
from mor.engine.store import KVStore
from mor.engine.view import block_pages
from mor.model.model import MoRModel
from mor.model.packed import PackedModel
from mor.model.packed_layers import PackedStage
from mor.model.routers.base import Router
from mor.model.routers.boundary import BoundaryRouter
from mor.model.routers.controls import FixedRouter
from mor.ops import native
from mor.ops.rope import Rotation


class QuickStages(NamedTuple):
    """The stages in one call each; None where a stage has something that the kernel does not know.

    Attributes:
        start: embedding, prelude, and who runs depth 0.
        run: a pass of the block, and who goes on.
        finish: the coda.
    """

    start: native.LanePass | None = None
    run: native.LanePass | None = None
    finish: native.LanePass | None = None


def make_quick_stages(
    model: MoRModel, store: KVStore, lanes: Lanes, attention: PagedAttention, turns: Rotation
) -> QuickStages:
    """The stages that can run so.

    Args:
        model: the network.
        store: pages.
        lanes: of tokens in flight.
        attention: form of attention; only the kernels' own is known.
        turns: rotations of all positions, [places, d] each.
    """
    streams = lanes.hidden
    known = isinstance(model, PackedModel) and attention is native_attention
    plain = model.seam is None and model.depth_embedding is None and not model.needs_origin
    if not known or not plain or model.config.interleaved or model.config.modality != "text":
        return QuickStages()
    if not native.holds(store.block.pool.keys) or not native.fits(streams, *turns):
        return QuickStages()
    private = block_pages(store.private, None)

    def stage(
        layers: object, source: Tensor, first: int, settling: native.Settling | None
    ) -> native.LanePass | None:
        whole = layers.whole if isinstance(layers, PackedStage) else None
        pages = block_pages(store.block, store.origins) if layers is model.block else private
        if whole is None or not native.fits(source):
            return None
        return native.LanePass(whole, pages, first, source, turns, settling)

    finish = stage(model.coda_layers, streams, len(model.prelude_layers), None)
    router, asked, rule = model.router, None, "last"
    if type(router) is not FixedRouter:
        own = type(router)
        if not isinstance(router, BoundaryRouter) or own.update is not Router.update:
            return QuickStages(finish=finish)
        asked, rule = router.kernel_answers(), model.config.update_rule
        if own.start is not Router.start or asked is None:
            return QuickStages(finish=finish)
        if not native.fits(asked.weight, asked.boundary):
            return QuickStages(finish=finish)
    gates, embedding = lanes.gates(), model.embed_tokens.weight
    entered = native.Settling(streams, gates, "last", 0, asked)
    ran = native.Settling(streams, gates, rule, 1, asked)
    start = None
    if type(model.embed_tokens) is nn.Embedding:  # no adapter sits on it
        start = stage(model.prelude_layers, embedding.detach(), 0, entered)
    return QuickStages(start, stage(model.block, streams, 0, ran), finish)
