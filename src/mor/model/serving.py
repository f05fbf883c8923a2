"""A view of a model for decoding on the CPU: the same network over weights packed for few rows.

The view shares every parameter with the model it was made from and runs the same stages; only the
two halves of a layer, and the head, go through :mod:`mor.ops.native` where that fits. The packed
copies are a snapshot: make a new view after the weights have changed.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from mor.model.layers import Attend, DecoderLayer, Heads, Stack
from mor.model.model import MoRModel
from mor.ops.native import (
    HEAD_DIMS,
    PackedLayer,
    PackedLinear,
    PackedStack,
    Workspace,
    fits,
    library,
)
from mor.ops.rope import Rotation


class PackedHalves:
    """:meth:`DecoderLayer.enter` and ``leave`` over packed weights."""

    def __init__(self, layer: DecoderLayer, work: Workspace) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self.work, self.head_dim = work, attention.head_dim

        def packed(*linears: nn.Linear, paired: bool = False) -> PackedLinear:
            return PackedLinear(
                [m.weight for m in linears], [m.bias for m in linears], paired=paired
            )

        norms = (
            layer.input_layernorm.weight,
            layer.post_attention_layernorm.weight,
            None if attention.q_norm is None else attention.q_norm.weight,
            None if attention.k_norm is None else attention.k_norm.weight,
        )
        self.packed = PackedLayer(
            packed(attention.q_proj),
            packed(attention.k_proj, attention.v_proj),
            packed(attention.o_proj),
            packed(mlp.gate_proj, mlp.up_proj, paired=True),
            packed(mlp.down_proj),
            norms,
            attention.q_proj.out_features // attention.head_dim,
            attention.k_proj.out_features // attention.head_dim,
            attention.head_dim,
            layer.input_layernorm.eps,
        )

    def fits(self, hidden: Tensor) -> bool:
        """Whether they can run on these tokens."""
        return hidden.shape[0] == 1 and fits(hidden)

    def enter(
        self, hidden: Tensor, rope: Rotation, use: int | Tensor, with_kv: bool | int
    ) -> Heads:
        """As the layer's, for one run [1, M, D]."""
        cos, sin = (part[0].contiguous() for part in rope)
        count = hidden.shape[1] if with_kv is True else int(with_kv)
        query, both = self.packed.enter(hidden[0].contiguous(), cos, sin, use, count, self.work)
        if not with_kv:
            return query.transpose(0, 1)[None], None, None
        key, value = both.transpose(0, 2).unbind(1)  # [Hkv, with_kv, d]
        return query.transpose(0, 1)[None], key[None], value[None]

    def leave(self, hidden: Tensor, mixed: Tensor, use: int | Tensor) -> Tensor:
        """As the layer's, for one run."""
        flat = mixed[0].transpose(0, 1).contiguous()
        return self.packed.leave(hidden[0].contiguous(), flat, use, self.work)[None]


class ServingStack(Stack):
    """The layers of a stage, all of them packed, over the engine's pages in one call."""

    def __init__(self, layers: list[DecoderLayer], halves: list[PackedHalves]) -> None:
        super().__init__(layers)
        self.packed = PackedStack([half.packed for half in halves], halves[0].work)

    def run(
        self, hidden: Tensor, rope: Rotation, attend: Attend, use: int | Tensor
    ) -> Tensor | None:
        """See :class:`Stack`."""
        told = getattr(attend, "pages", None)  # the engine's alone says where its pages are
        pages = None if told is None or hidden.shape[0] != 1 or not fits(hidden) else told()
        if pages is None:
            return None
        wanted = attend.needs_kv(0)
        count = hidden.shape[1] if wanted is True else int(wanted)
        cos, sin = (part[0].contiguous() for part in rope)
        return self.packed(hidden[0], cos, sin, use, count, *pages)[None]


def packable(layer: DecoderLayer) -> bool:
    """Whether the kernels know all of this layer: widths in whole vectors, nothing that relaxes."""
    attention, mlp = layer.self_attn, layer.mlp
    relaxed = attention.low_rank is not None or layer.attention_gain is not None
    widths = (attention.q_proj.in_features, mlp.down_proj.in_features)
    plain = all(type(m) is nn.Linear for m in (*_maps(attention), *_maps(mlp)))
    whole = all(width % 16 == 0 for width in widths)
    return plain and not relaxed and whole and attention.head_dim in HEAD_DIMS


def _maps(half: nn.Module) -> list[nn.Module]:
    return [module for name, module in half.named_children() if name.endswith("_proj")]


def serving_view(model: MoRModel) -> MoRModel:
    """``model`` itself, or a view of it that runs on packed weights where there are kernels.

    Args:
        model: in evaluation mode; it is not changed.
    """
    weight = model.embed_tokens.weight
    if library() is None or weight.device.type != "cpu" or weight.dtype != torch.float32:
        return model
    work = Workspace()
    view = copy.copy(model)
    view._modules = dict(model._modules)
    for name in ("prelude_layers", "block", "coda_layers"):
        layers = [_view_of(layer, work) for layer in getattr(model, name)]
        halves = [h for layer in layers if isinstance(h := layer.packed, PackedHalves)]
        whole = layers and len(halves) == len(layers)
        view._modules[name] = ServingStack(layers, halves) if whole else Stack(layers)
    if type(model.lm_head) is nn.Linear and model.config.hidden_size % 16 == 0:
        view.packed_head = (PackedLinear([model.lm_head.weight], [None]), work)
    return view


def _view_of(layer: nn.Module, work: Workspace) -> DecoderLayer:
    assert isinstance(layer, DecoderLayer)
    if not packable(layer):
        return layer
    view = copy.copy(layer)
    view.packed = PackedHalves(layer, work)
    return view
