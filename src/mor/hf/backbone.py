"""The network without its head, as libraries call it that bring a head and a loss of their own.

TRL's trainers compute ``log p`` from ``model.base_model(...).last_hidden_state`` and the head's
weight, tile by tile. They never see the loss that the model computes, so the routers' terms come in
by another door: they hang on the hidden states and enter with the backward pass.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutput

from mor.model.model import MoRModel
from mor.model.routers.base import active_router


class _AddedLoss(torch.autograd.Function):
    """The hidden states as they are; in the backward pass, gradient 1 for the loss beside them."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, loss: Tensor) -> Tensor:
        ctx.like = loss.detach()
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, Tensor]:
        return gradients[0], torch.ones_like(ctx.like)


class Backbone:
    """``MoRModel`` with Transformers' arguments and ``last_hidden_state`` after the final norm.

    In training, the weighted router terms of a micro-batch are divided by ``router.micro_batches``,
    as TRL does with the balancing loss of experts. (The model's own loss is exact where
    micro-batches differ in size: it weighs them by their targets, which are not known here.)
    """

    def __init__(self, model: MoRModel) -> None:
        self._model = model

    def __getattr__(self, name: str) -> Any:
        """Anything else is the network's."""
        if name == "_model":  # asked for before it is there, as copying does
            raise AttributeError(name)
        return getattr(self._model, name)

    def __call__(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        cu_seq_lens_q: Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutput:
        """Hidden states [B, T, D] for ids [B, T] or embeddings [B, T, D]; never a cache.

        Args:
            input_ids, attention_mask, inputs_embeds: as for :class:`mor.hf.MoRForCausalLM`.
            position_ids: [B, T].
            use_cache: not looked at.
            cu_seq_lens_q: see :func:`packed_documents`.
        """
        output = self._model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            positions=position_ids,
            inputs_embeds=inputs_embeds,
            document_ids=packed_documents(position_ids, attention_mask, cu_seq_lens_q),
        )
        hidden = self._model.norm(output.hidden)
        router = active_router(self._model.router)
        weighted = [router.loss_weight(name) * term for name, term in output.losses.items()]
        if weighted and hidden.requires_grad:
            total = torch.stack(weighted).sum() / router.micro_batches
            hidden = _AddedLoss.apply(hidden, total)
        return BaseModelOutput(last_hidden_state=hidden)


def packed_documents(
    position_ids: Tensor | None, attention_mask: Tensor | None, cu_seq_lens_q: Tensor | None
) -> Tensor | None:
    """Which document each token belongs to, from what Transformers' packing collators send.

    Args:
        position_ids: [B, T]; without a mask, a position that does not rise begins a document
            (``DataCollatorWithFlattening``).
        attention_mask: [B, T'] or None.
        cu_seq_lens_q: [documents + 1] where the documents of one row [1, T] begin, and the last
            one's end.

    Returns:
        [B, T], or None where every row is one document.
    """
    if cu_seq_lens_q is not None:
        places = torch.arange(int(cu_seq_lens_q[-1]), device=cu_seq_lens_q.device)
        return torch.bucketize(places, cu_seq_lens_q[1:-1], right=True)[None]
    if position_ids is None or attention_mask is not None or position_ids.shape[-1] < 2:
        return None
    begins = torch.zeros_like(position_ids, dtype=torch.bool)
    begins[..., 1:] = position_ids[..., 1:] <= position_ids[..., :-1]
    return begins.cumsum(-1) if bool(begins.any()) else None
