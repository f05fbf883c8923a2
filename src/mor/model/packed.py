"""A view of a model for decoding on the CPU: the same network over weights packed for few rows.

The view shares every parameter with the model it was made from and runs the same stages; only the
linear maps, the two halves of a layer, whole stages over the engine's pages, and the head go
through :mod:`mor.ops.native`. The packed copies are a snapshot: make a new view after the weights
have changed.
"""

from __future__ import annotations

import copy
from typing import Literal, TypeVar, get_args

import torch
from torch import Tensor, nn

from mor.errors import MorError
from mor.model.layers import Attend, DecoderLayer, Heads, Stack
from mor.model.model import MoRModel
from mor.ops import native
from mor.ops.native import HEAD_DIMS, PackedLayer, PackedLinear, PackedStack, Workspace, fits
from mor.ops.rope import Rotation

Quantization = Literal["int8"]
_Module = TypeVar("_Module", bound=nn.Module)


class PackedHalves:
    """:meth:`DecoderLayer.enter` and ``leave`` over packed weights."""

    def __init__(self, layer: DecoderLayer, work: Workspace, int8: bool) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self.work, self.int8 = work, int8

        def packed(*linears: nn.Linear, paired: bool = False) -> PackedLinear:
            biases: list[Tensor | None] = [m.bias for m in linears]
            return PackedLinear([m.weight for m in linears], biases, paired=paired, int8=int8)

        norms = (
            layer.input_layernorm.weight,
            layer.post_attention_layernorm.weight,
            None if attention.q_norm is None else attention.q_norm.weight,
            None if attention.k_norm is None else attention.k_norm.weight,
        )
        gains = None
        if layer.attention_gain is not None and layer.mlp_gain is not None:
            gains = (layer.attention_gain.weight, layer.mlp_gain.weight)
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
            gains,
        )

    def fits(self, hidden: Tensor) -> bool:
        """Whether they can run on these tokens."""
        return _fits(hidden, self.int8)

    def enter(
        self, hidden: Tensor, rope: Rotation, use: int | Tensor, with_kv: bool | int
    ) -> Heads:
        """As the layer's."""
        batch, width = hidden.shape[:2]
        cos, sin = (part.expand(batch, -1, -1).flatten(0, 1).contiguous() for part in rope)
        count = batch * width if with_kv is True else int(with_kv)  # a number is for one run alone
        flat = hidden.flatten(0, 1).contiguous()
        query, both = self.packed.enter(flat, cos, sin, use, count, self.work)
        heads = query.unflatten(0, (batch, width)).transpose(1, 2)
        if not with_kv:
            return heads, None, None
        key, value = (own.unflatten(0, (batch, -1)).transpose(1, 2) for own in both.unbind(1))
        return heads, key, value

    def leave(self, hidden: Tensor, mixed: Tensor, use: int | Tensor) -> Tensor:
        """As the layer's."""
        flat = mixed.transpose(1, 2).flatten(0, 1).contiguous()
        out = self.packed.leave(hidden.flatten(0, 1).contiguous(), flat, use, self.work)
        return out.unflatten(0, hidden.shape[:2])


class PackedMap(nn.Module):
    """A linear map over packed weights, in layers that do more than the kernels know."""

    def __init__(self, linear: nn.Linear, work: Workspace, int8: bool) -> None:
        super().__init__()
        self.linear, self.work, self.int8 = linear, work, int8
        self.packed = PackedLinear([linear.weight], [linear.bias], int8=int8)

    def forward(self, hidden: Tensor) -> Tensor:
        """[..., inputs] -> [..., outputs]."""
        if not _fits(hidden, self.int8):
            return self.linear(hidden)
        flat = self.packed(hidden.flatten(0, -2), self.work)
        return flat.unflatten(0, hidden.shape[:-1])


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


def serving_view(model: MoRModel, quantization: Quantization | None = None) -> MoRModel:
    """``model`` itself, or a view of it that runs on packed weights where there are kernels.

    Args:
        model: in evaluation mode; it is not changed.
        quantization: ``int8`` keeps the weights of layers and head as bytes, a scale per output,
            and multiplies them with inputs of bytes, a scale per token and 64 inputs. The
            embedding, norms, router and whatever relaxes sharing stay as they are.

    Raises:
        MorError: a quantization that is not known, or that cannot run here.
    """
    if quantization is not None and quantization not in get_args(Quantization):
        raise MorError(f"quantization={quantization!r} is not known; use 'int8', or none")
    weight = model.embed_tokens.weight
    possible = weight.device.type == "cpu" and weight.dtype == torch.float32
    if native.library() is None or not possible:
        if quantization is None:
            return model
        why = native.missing() or f"the model is {weight.dtype} on {weight.device.type}"
        raise MorError(
            f"quantization={quantization!r} needs the CPU kernels and a float32 model: {why}"
        )
    int8, work = quantization == "int8", Workspace()
    view = copy.copy(model)
    view._modules = dict(model._modules)
    for name in ("prelude_layers", "block", "coda_layers"):
        layers = [_view_of(layer, work, int8) for layer in getattr(model, name)]
        halves = [h for layer in layers if isinstance(h := layer.packed, PackedHalves)]
        whole = layers and len(halves) == len(layers)
        view._modules[name] = ServingStack(layers, halves) if whole else Stack(layers)
    if type(model.lm_head) is nn.Linear and model.config.hidden_size % 16 == 0:
        view.packed_head = (PackedLinear([model.lm_head.weight], [None], int8=int8), work)
    return view


def _fits(hidden: Tensor, int8: bool) -> bool:
    """Whether kernels can run; weights of bytes must not silently be the others instead."""
    if fits(hidden):
        return True
    if int8:
        raise MorError(
            f"int8 weights take float32 on the CPU without gradients; got {hidden.dtype} on "
            f"{hidden.device.type}, gradients {'on' if torch.is_grad_enabled() else 'off'}"
        )
    return False


def _maps(half: nn.Module) -> dict[str, nn.Module]:
    return {name: m for name, m in half.named_children() if name.endswith("_proj")}


def _packable(layer: DecoderLayer) -> bool:
    """Whether the kernels know all of this layer: widths in whole vectors, no low-rank maps."""
    attention, mlp = layer.self_attn, layer.mlp
    widths = (attention.q_proj.in_features, mlp.down_proj.in_features)
    maps = (*_maps(attention).values(), *_maps(mlp).values())
    plain = all(type(m) is nn.Linear for m in maps)
    whole = all(width % 16 == 0 for width in widths)
    return plain and attention.low_rank is None and whole and attention.head_dim in HEAD_DIMS


def _view_of(layer: nn.Module, work: Workspace, int8: bool) -> DecoderLayer:
    assert isinstance(layer, DecoderLayer)
    view = _shallow(layer)
    if _packable(layer):
        view.packed = PackedHalves(layer, work, int8)
        return view
    for name in ("self_attn", "mlp"):
        half = _shallow(getattr(layer, name))
        for own, linear in _maps(half).items():
            if type(linear) is nn.Linear:
                half._modules[own] = PackedMap(linear, work, int8)
        view._modules[name] = half
    return view


def _shallow(module: _Module) -> _Module:
    """A copy with the same parameters and modules, whose modules can be replaced."""
    view = copy.copy(module)
    view._modules = dict(module._modules)
    return view
