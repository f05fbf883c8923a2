"""The network over weights packed for few rows: for decoding on the CPU.

:class:`PackedModel` shares every parameter with the model it was made from and runs the same
stages; only the linear maps, the two halves of a layer, whole stages over the engine's pages, and
the head go through :mod:`mor.ops.native`. All knowledge of packed weights is here. The packed
copies are a snapshot: make a new view after the weights have changed.
"""

from __future__ import annotations

import copy
from typing import Any, Literal, TypeVar, get_args

import torch
from torch import Tensor, nn

from mor.errors import MorError
from mor.model.attend.protocol import Attend
from mor.model.layers import DecoderLayer, Heads
from mor.model.model import MoRModel
from mor.model.recorder import Recorder
from mor.ops import native
from mor.ops.cross_entropy import plain_cross_entropy
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
        """Whether the halves can run on hidden [A, M, D].

        Raises:
            MorError: weights of bytes, and tokens that the kernels cannot take.
        """
        return _fits(hidden, self.int8)

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
        self.linear, self.work, self.int8 = linear, work, int8
        self.packed = PackedLinear([linear.weight], [linear.bias], int8=int8)

    def forward(self, hidden: Tensor) -> Tensor:
        """[..., inputs] -> [..., outputs]."""
        if not _fits(hidden, self.int8):
            return self.linear(hidden)
        flat = self.packed(hidden.flatten(0, -2), self.work)
        return flat.unflatten(0, hidden.shape[:-1])


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


class PackedModel(MoRModel):
    """The same network over packed weights: every parameter and the router are ``model``'s own.

    Args:
        model: float32 on the CPU, in evaluation mode; it is not changed.
        int8: keep packed weights as bytes.

    Attributes:
        packed_head: the head's weights; None where the kernels cannot take them.
    """

    def __init__(self, model: MoRModel, int8: bool) -> None:
        nn.Module.__init__(self)  # the weights are there already
        self.work = work = Workspace()
        self.config, self.training = model.config, model.training
        self.gradient_checkpointing = model.gradient_checkpointing
        self.embed_tokens = model.embed_tokens
        self.prelude_layers = PackedStage(model.prelude_layers, work, int8)
        self.block = PackedStage(model.block, work, int8)
        self.depth_embedding = model.depth_embedding
        self.coda_layers = PackedStage(model.coda_layers, work, int8)
        self.norm, self.lm_head, self.router = model.norm, model.lm_head, model.router
        self.packed_head: PackedLinear | None = None
        if type(model.lm_head) is nn.Linear and model.config.hidden_size % 16 == 0:
            self.packed_head = PackedLinear([model.lm_head.weight], [None], int8=int8)

    def head(self, hidden: Tensor) -> Tensor:
        """Final norm and vocabulary projection, [..., D] -> logits [..., V]."""
        if self.packed_head is None or not fits(hidden):
            return super().head(hidden)
        flat, norm = hidden.flatten(0, -2), self.norm
        logits = self.packed_head.after_norm(flat, norm.weight, norm.eps, self.work)
        return logits.unflatten(0, hidden.shape[:-1])

    def head_loss(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Sum of the cross-entropies of :meth:`head` at ``targets``, some rows at a time."""
        if self.packed_head is None or not fits(hidden):
            return super().head_loss(hidden, targets)
        rows, wanted = hidden.flatten(0, -2).split(256), targets.split(256)
        parts = [
            plain_cross_entropy(self.head(one), own) for one, own in zip(rows, wanted, strict=True)
        ]
        return torch.stack(parts).sum()

    def run_layers(
        self,
        layers: nn.ModuleList,
        hidden: Tensor,
        rope: Rotation,
        attend: Attend,
        use: int | Tensor = 0,
        recorder: Recorder | None = None,
    ) -> Tensor:
        """The layers of a stage, [A, M, D] -> [A, M, D]: in one call where keys lie in pages."""
        whole = layers.whole if isinstance(layers, PackedStage) else None
        watched = recorder is not None and recorder.states is not None
        if whole is not None and not watched and hidden.shape[0] == 1 and fits(hidden):
            pages = attend.pages()
            if pages is not None:
                wanted = attend.needs_kv(0)
                count = hidden.shape[1] if wanted is True else int(wanted)
                cos, sin = (part[0].contiguous() for part in rope)
                return whole(hidden[0], cos, sin, use, count, *pages)[None]
        return super().run_layers(layers, hidden, rope, attend, use, recorder)


def serving_view(model: MoRModel, quantization: Quantization | None = None) -> MoRModel:
    """``model`` itself, or a :class:`PackedModel` of it where there are kernels.

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
    return PackedModel(model, quantization == "int8")


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


def _pack_layer(layer: nn.Module, work: Workspace, int8: bool) -> DecoderLayer:
    """A layer over packed weights; where the kernels do not know all of it, its linear maps."""
    assert isinstance(layer, DecoderLayer)
    if _packable(layer):
        return PackedDecoderLayer(layer, work, int8)
    halves = {}
    for name, half in (("self_attn", layer.self_attn), ("mlp", layer.mlp)):
        maps = {n: PackedMap(m, work, int8) for n, m in _maps(half).items() if type(m) is nn.Linear}
        halves[name] = copy_around(half, **maps)
    return copy_around(layer, **halves)
