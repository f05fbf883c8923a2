"""Layers for decoding on a GPU: few products, and one kernel between two of them.

Query, key and value are one product, gate and up another, and the residual is added within a
product. All else is in :mod:`mor.ops.fused`. The joined weights are a copy: make a new view after
the weights have changed.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mor.model.attend.protocol import Attend
from mor.model.layers import DecoderLayer, RMSNorm
from mor.model.model import MoRModel
from mor.model.packed_layers import copy_around
from mor.ops.planned import explain_no_triton
from mor.ops.rope import Rotation


class FusedNorm(RMSNorm):
    """:class:`RMSNorm` with one weight, in one kernel."""

    def __init__(self, norm: RMSNorm) -> None:
        nn.Module.__init__(self)  # the weight is there already
        self.weight, self.eps = norm.weight, norm.eps
        self.kernels: Any = import_module("mor.ops.fused")

    def forward(self, hidden: Tensor, use: int | Tensor = 0) -> Tensor:
        """[..., D] -> [..., D]."""
        flat = self.kernels.fused_norm(hidden.flatten(0, -2), self.weight, self.eps)
        return flat.view(hidden.shape)


class FusedDecoderLayer(DecoderLayer):
    """A decoder layer in ten kernels, attention and the writing of its entries included.

    Args:
        layer: whose parameters these are; :func:`is_fusable` must hold.
    """

    def __init__(self, layer: DecoderLayer) -> None:
        nn.Module.__init__(self)  # the weights are there already
        attention, mlp = layer.self_attn, layer.mlp
        self.input_layernorm = FusedNorm(layer.input_layernorm)
        self.post_attention_layernorm = FusedNorm(layer.post_attention_layernorm)
        self.self_attn, self.mlp, self.compiled = attention, mlp, False
        self.training = layer.training
        maps = (attention.q_proj, attention.k_proj, attention.v_proj)
        with torch.no_grad():
            self.heads = torch.cat([m.weight for m in maps])
            self.gate_up = torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight])
        self.width = attention.head_dim
        self.queries, self.keys = (m.out_features // self.width for m in maps[:2])
        self.kernels: Any = import_module("mor.ops.fused")

    def forward(
        self,
        hidden: Tensor,
        rope: Rotation,
        attend: Attend,
        layer: int,
        use: int | Tensor = 0,
    ) -> Tensor:
        """[A, M, D] -> [A, M, D], as :meth:`DecoderLayer.forward`."""
        batch, places = hidden.shape[:2]
        flat = hidden.flatten(0, 1)
        # In rows of a batch heads stand before places; over pages there is one row.
        mixed = attend(layer, *self._project(flat, rope, (batch, places), attend.needs_kv(layer)))
        flat_mixed = mixed.transpose(1, 2).reshape(batch * places, -1)
        flat = torch.addmm(flat, flat_mixed, self.self_attn.o_proj.weight.t())
        normed = self.post_attention_layernorm(flat)
        active = self.kernels.fused_silu_mul(F.linear(normed, self.gate_up))
        flat = torch.addmm(flat, active, self.mlp.down_proj.weight.t())
        return flat.view(hidden.shape)

    def _project(
        self, flat: Tensor, rope: Rotation, shape: tuple[int, int], with_kv: bool | int
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Query, key and value as :meth:`Attention.project` gives them, of [N, D]."""
        normed = self.input_layernorm(flat)
        cos, sin = (part.expand(shape[0], -1, -1).flatten(0, 1) for part in rope)
        keys = self.keys if with_kv else 0
        wanted = (self.queries + 2 * keys) * self.width
        heads = F.linear(normed, self.heads[:wanted])
        query, key = self.kernels.fused_rotate(heads, cos, sin, self.queries, keys)
        query = query.unflatten(0, shape).transpose(1, 2)
        if not with_kv:
            return query, None, None
        value = heads[:, -keys * self.width :].unflatten(1, (keys, self.width))
        both = (one.unflatten(0, shape).transpose(1, 2) for one in (key, value))
        if with_kv is True:
            return query, *both
        first, second = (one[:, :, :with_kv] for one in both)
        return query, first, second


def is_fusable(layer: DecoderLayer) -> bool:
    """Whether all of the layer is plain: linear maps without bias, norms with one weight."""
    attention, mlp = layer.self_attn, layer.mlp
    maps = [*attention.children(), *mlp.children()]
    linear = [m for m in maps if type(m) is nn.Linear and m.bias is None]
    norms = (layer.input_layernorm, layer.post_attention_layernorm)
    plain = all(type(norm) is RMSNorm and norm.weight.dim() == 1 for norm in norms)
    gains = layer.attention_gain is not None or layer.mlp_gain is not None
    # Seven maps and nothing else: no norms of query and key, no low-rank maps.
    return plain and not gains and len(linear) == len(maps) == 7 and attention.head_dim % 2 == 0


def fused_view(model: MoRModel) -> MoRModel:
    """The network with its plain layers fused, over the same parameters and a joined copy of some.

    ``model`` itself where kernels cannot run.

    Args:
        model: in evaluation mode; it is not changed.
    """
    weight = model.embed_tokens.weight
    if explain_no_triton(weight.device, weight.dtype) is not None:
        return model
    stages = {
        name: nn.ModuleList(map(_fuse, getattr(model, name)))
        for name in ("prelude_layers", "block", "coda_layers")
    }
    norm = FusedNorm(model.norm) if type(model.norm) is RMSNorm else model.norm
    return copy_around(model, norm=norm, **stages)


def _fuse(layer: nn.Module) -> nn.Module:
    assert isinstance(layer, DecoderLayer)
    return FusedDecoderLayer(layer) if is_fusable(layer) else layer
