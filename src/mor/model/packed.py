"""The network over weights packed for few rows: for decoding on the CPU.

:class:`PackedModel` shares every parameter with the model it was made from and runs the same
stages; only the linear maps, the two halves of a layer, whole stages over the engine's pages, and
the head go through :mod:`mor.ops.native`. All knowledge of packed weights is here and in
:mod:`mor.model.packed_layers`. The packed copies are a snapshot: make a new view after the weights
have changed.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor, nn

from mor.errors import MorError
from mor.model.attend.protocol import Attend
from mor.model.model import MoRModel
from mor.model.packed_layers import PackedMap, PackedStage, fit_kernels, release, release_stage
from mor.model.recorder import Recorder
from mor.ops import native
from mor.ops.cross_entropy import plain_cross_entropy
from mor.ops.native import PackedLinear, Workspace, fits
from mor.ops.rope import Rotation

Quantization = Literal["int8"]


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
        self.seam = model.seam
        self.coda_layers = PackedStage(model.coda_layers, work, int8)
        self.norm, self.lm_head, self.router = model.norm, model.lm_head, model.router
        self.packed_head: PackedLinear | None = None
        self.only_head: str | None = None
        if model.config.head_type != "vocabulary":
            pass  # pooled first, and run once: there is nothing to gain
        elif type(model.lm_head) is nn.Linear and model.config.hidden_size % 16 == 0:
            self.packed_head = PackedLinear([model.lm_head.weight], [None], int8=int8)
        elif type(model.lm_head) is nn.Linear:
            self.lm_head = PackedMap(model.lm_head, work, int8)  # type: ignore[assignment]

    def head(self, hidden: Tensor, real: Tensor | None = None) -> Tensor:
        """Final norm and vocabulary projection, [..., D] -> logits [..., V]."""
        if self.packed_head is None or not fit_kernels(hidden, self.only_head):
            return super().head(hidden, real)
        flat, norm = hidden.flatten(0, -2), self.norm
        logits = self.packed_head.after_norm(flat, norm.weight, norm.eps, self.work)
        return logits.unflatten(0, hidden.shape[:-1])

    def head_loss(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Sum of the cross-entropies of :meth:`head` at ``targets``, some rows at a time."""
        if self.packed_head is None or not fit_kernels(hidden, self.only_head):
            return super().head_loss(hidden, targets)
        rows, wanted = hidden.flatten(0, -2).split(256), targets.split(256)
        parts = [
            plain_cross_entropy(self.head(one), own) for one, own in zip(rows, wanted, strict=True)
        ]
        return torch.stack(parts).sum()

    def release_plain(self) -> None:
        """Free the weights that are there packed too: half the memory of serving.

        The model that this view was made of cannot run afterwards. A head tied to the embedding
        stays, since the embedding is read as it is.
        """
        for stage in (self.prelude_layers, self.block, self.coda_layers):
            release_stage(stage)
        if self.packed_head is not None and self.lm_head.weight is not self.embed_tokens.weight:
            release(self.lm_head)
            self.only_head = "packed"

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


def check_quantization(quantization: str | None) -> None:
    """Refuse a word that is no quantization.

    Raises:
        MorError: naming it.
    """
    if quantization is not None and quantization not in get_args(Quantization):
        raise MorError(f"quantization={quantization!r} is not known; use 'int8', or none")


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
    check_quantization(quantization)
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
