"""What the model's forward returns: Transformers' output plus what the routers did."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    CausalLMOutputWithPast,
    ImageClassifierOutput,
    SequenceClassifierOutputWithPast,
)

from mor.hf.arguments import CACHE_NAME
from mor.model.recorder import DepthTrace


@dataclass
class MoRCausalLMOutput(CausalLMOutputWithPast):
    """Transformers' output plus what the routers did.

    Attributes:
        loss: total to back-propagate: language-model loss and weighted router losses.
        lm_loss: the language-model part, nats per token.
        router_losses: unweighted router terms by name (``aux_loss``, ``balancing_loss``, ...).
        exit_losses: in training with ``exit_loss_weights``: by number of recursions, the
            cross-entropy at that exit, not weighted.
        depths: [B, T] recursions each token ran, 0 at padding.
        traces: scores and selections per depth, with ``output_router_traces=True``.

    The cache has Transformers' name for it, ``cache`` or before 5.24 ``past_key_values``; both can
    be read.
    """

    lm_loss: Tensor | None = None
    router_losses: dict[str, Tensor] | None = None
    exit_losses: dict[int, Tensor] | None = None
    depths: Tensor | None = None
    traces: tuple[DepthTrace, ...] | None = None


@dataclass
class MoRBaseOutput(BaseModelOutputWithPast):
    """Hidden states [B, T, D] after the final norm, and what the routers did.

    Attributes:
        router_losses: unweighted router terms by name, in training.
        depths: [B, T] recursions each token ran, 0 at padding.
    """

    router_losses: dict[str, Tensor] | None = None
    depths: Tensor | None = None


@dataclass
class MoRClassifierOutput(SequenceClassifierOutputWithPast):
    """Logits [B, num_labels], the loss with the weighted router losses, and what the routers did.

    Attributes:
        router_losses: unweighted router terms by name, in training.
        depths: [B, T] recursions each token ran, 0 at padding.
    """

    router_losses: dict[str, Tensor] | None = None
    depths: Tensor | None = None


@dataclass
class MoRMediaOutput(ImageClassifierOutput):
    """Logits [B, num_labels] of images or sounds, or the next patch or frame [B, T, W].

    Attributes:
        loss: total to back-propagate: that of the labels and the weighted router losses.
        label_loss: the first part, a mean over the rows (of a regression: over its numbers).
        router_losses: unweighted router terms by name, in training.
        exit_losses: in training with ``exit_loss_weights``: by number of recursions, the loss of
            the labels at that exit, not weighted.
        depths: [B, T] recursions each token ran, 0 at padding: patches row by row, or the tokens
            that the convolution made of frames.
        token_mask: bool [B, T] which tokens are real; None where all are.
        traces: scores and selections per depth, with ``output_router_traces=True``.
    """

    label_loss: Tensor | None = None
    router_losses: dict[str, Tensor] | None = None
    exit_losses: dict[int, Tensor] | None = None
    depths: Tensor | None = None
    token_mask: Tensor | None = None
    traces: tuple[DepthTrace, ...] | None = None


if CACHE_NAME != "cache":  # before 5.24; since then the other name is a property
    _outputs: tuple[Any, ...] = (MoRCausalLMOutput, MoRBaseOutput, MoRClassifierOutput)
    for _output in _outputs:
        _output.cache = property(lambda output: output.past_key_values)
