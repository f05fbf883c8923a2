"""Layers over packed weights: a layer's two halves, its linear maps, a stage in one call."""

from __future__ import annotations

import copy
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from mor.errors import MorError
from mor.model.attend.protocol import Attend
from mor.model.layers import MLP, DecoderLayer, Heads
from mor.model.relaxation import LowRank, Relaxable
from mor.ops import pointwise
from mor.ops.native import HEAD_DIMS, PackedLayer, PackedLinear, PackedStack, Workspace, fits
from mor.ops.planned import one_hot
from mor.ops.rope import Rotation

_Module = TypeVar("_Module", bound=nn.Module)


class PackedHalves:
    """:meth:`DecoderLayer.enter` and ``leave`` over packed weights."""

    def __init__(self, layer: DecoderLayer, work: Workspace, int8: bool) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self.work, self.only = work, "int8" if int8 else None

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
        """Whether the halves can run on hidden [A, M, D].

        Raises:
            MorError: there are no plain weights, and tokens that the kernels cannot take.
        """
        return fit_kernels(hidden, self.only)

    def enter(
        self, hidden: Tensor, rope: Rotation, use: int | Tensor, with_kv: bool | int
    ) -> Heads:
        """Query, key and value of hidden [A, M, D], as :meth:`DecoderLayer.enter`."""
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
        """The stream [A, M, D] after the layer, as :meth:`DecoderLayer.leave`."""
        flat = mixed.transpose(1, 2).flatten(0, 1).contiguous()
        out = self.packed.leave(hidden.flatten(0, 1).contiguous(), flat, use, self.work)
        return out.unflatten(0, hidden.shape[:2])


class PackedMap(nn.Module):
    """A linear map over packed weights, in layers that do more than the kernels know."""

    def __init__(self, linear: nn.Linear, work: Workspace, int8: bool) -> None:
        super().__init__()
        self.linear, self.work, self.only = linear, work, "int8" if int8 else None
        self.packed = PackedLinear([linear.weight], [linear.bias], int8=int8)

    def forward(self, hidden: Tensor) -> Tensor:
        """[..., inputs] -> [..., outputs]."""
        if not fit_kernels(hidden, self.only):
            return self.linear(hidden)
        flat = self.packed(hidden.flatten(0, -2), self.work)
        return flat.unflatten(0, hidden.shape[:-1])


class PackedLowRank(nn.Module):
    """:class:`LowRank` over packed products: all uses side by side, a token's own let through."""

    def __init__(self, low_rank: LowRank, work: Workspace) -> None:
        super().__init__()
        self.low_rank, self.work = low_rank, work
        uses, rank, _ = low_rank.down.shape
        self.shape = uses, rank
        self.down = PackedLinear([low_rank.down.flatten(0, 1)], [None])
        self.up = PackedLinear([low_rank.up.transpose(0, 1).flatten(1)], [None])

    def forward(self, hidden: Tensor, use: int | Tensor) -> Tensor:
        """[A, M, inputs] -> [A, M, outputs], as :class:`LowRank`."""
        if not fits(hidden):
            return self.low_rank(hidden, use)
        each = torch.as_tensor(use, device=hidden.device).expand(hidden.shape[:-1])
        own = one_hot(each.flatten(), self.shape[0], hidden.dtype)[..., None]
        thin = self.down(hidden.flatten(0, -2), self.work).unflatten(-1, self.shape) * own
        out = self.up(thin.flatten(1), self.work).unflatten(0, hidden.shape[:-1])
        return self.low_rank.finish(out, use)


class PackedDecoderLayer(DecoderLayer):
    """A decoder layer whose two halves run over packed weights, where the kernels can.

    Args:
        layer: whose parameters these are; the kernels must know all of it (:func:`_packable`).
        work: memory of the kernels.
        int8: keep packed weights as bytes.
    """

    def __init__(self, layer: DecoderLayer, work: Workspace, int8: bool) -> None:
        nn.Module.__init__(self)  # the weights are there already
        self.input_layernorm, self.self_attn = layer.input_layernorm, layer.self_attn
        self.post_attention_layernorm, self.mlp = layer.post_attention_layernorm, layer.mlp
        self.attention_gain, self.mlp_gain = layer.attention_gain, layer.mlp_gain
        self.compiled, self.training = layer.compiled, layer.training
        self.halves = PackedHalves(layer, work, int8)

    def forward(
        self,
        hidden: Tensor,
        rope: Rotation,
        attend: Attend,
        layer: int,
        use: int | Tensor = 0,
    ) -> Tensor:
        """[A, M, D] -> [A, M, D], as :meth:`DecoderLayer.forward`."""
        if not self.halves.fits(hidden):
            return super().forward(hidden, rope, attend, layer, use)
        query, key, value = self.halves.enter(hidden, rope, use, attend.needs_kv(layer))
        return self.halves.leave(hidden, attend(layer, query, key, value), use)

    def enter_kv(self, hidden: Tensor, rope: Rotation, use: int | Tensor) -> tuple[Tensor, Tensor]:
        """As :meth:`DecoderLayer.enter_kv`; the query is made too, and left."""
        if not self.halves.fits(hidden):
            return super().enter_kv(hidden, rope, use)
        _, key, value = self.halves.enter(hidden, rope, use, True)
        assert key is not None
        assert value is not None
        return key, value


class PackedStage(nn.ModuleList):
    """The layers of a stage; where all of them are packed, they also run in one call over pages.

    Attributes:
        whole: the layers as one call; None where some layer is not packed.
    """

    def __init__(self, layers: nn.ModuleList, work: Workspace, int8: bool) -> None:
        super().__init__(_pack_layer(layer, work, int8) for layer in layers)
        self.whole: PackedStack | None = None
        packed = [layer for layer in self if isinstance(layer, PackedDecoderLayer)]
        if packed and len(packed) == len(self):
            self.whole = PackedStack([layer.halves.packed for layer in packed], work)


def copy_around(module: _Module, **replaced: nn.Module) -> _Module:
    """A copy of ``module`` with the same parameters and the same children.

    Args:
        module: not changed.
        replaced: children of the copy that are others, by name.
    """
    own = (*module.children(), *module.parameters(False), *module.buffers(False))
    kept: dict[int, Any] = {id(part): part for part in own}
    config = getattr(module, "config", None)
    view = copy.deepcopy(module, kept | {id(config): config})
    for name, child in replaced.items():
        setattr(view, name, child)
    return view


def release(linear: nn.Linear) -> None:
    """Free the plain weights of a linear map; its packed ones are all there is then."""
    empty = linear.weight.new_empty(0)
    linear.weight = nn.Parameter(empty, requires_grad=False)


def release_stage(stage: nn.ModuleList) -> None:
    """Free the plain weights of all linear maps of a :class:`PackedStage`."""
    for part in stage.modules():
        if type(part) is nn.Linear:
            release(part)
        elif isinstance(part, PackedMap):
            part.only = part.only or "packed"
        elif isinstance(part, PackedDecoderLayer):
            part.halves.only = part.halves.only or "packed"


def fit_kernels(hidden: Tensor, only: str | None) -> bool:
    """Whether kernels can run on ``hidden``.

    Raises:
        MorError: they cannot, and ``only`` says which weights are all there is.
    """
    if fits(hidden):
        return True
    if only is not None:
        raise MorError(
            f"{only} weights take float32 on the CPU without gradients; got {hidden.dtype} on "
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


def _pack_layer(layer: nn.Module, work: Workspace, int8: bool) -> DecoderLayer:
    """A layer over packed weights; where the kernels do not know all of it, its linear maps."""
    assert isinstance(layer, DecoderLayer)
    if _packable(layer):
        return PackedDecoderLayer(layer, work, int8)
    halves = {"self_attn": _pack_maps(layer.self_attn, work, int8)}
    halves["mlp"] = _pack_maps(layer.mlp, work, int8)
    return copy_around(layer, **halves)


def _pack_maps(half: Relaxable, work: Workspace, int8: bool) -> Relaxable:
    """Half a layer whose linear maps are packed, one by one."""
    maps: dict[str, nn.Module] = {
        name: PackedMap(linear, work, int8)
        for name, linear in _maps(half).items()
        if type(linear) is nn.Linear
    }
    if half.low_rank is not None:
        own = [(name, one) for name, one in half.low_rank.items() if isinstance(one, LowRank)]
        maps["low_rank"] = nn.ModuleDict({name: PackedLowRank(one, work) for name, one in own})
    view = copy_around(half, **maps)
    if isinstance(view, MLP):
        view.silu = pointwise.silu
    return view
