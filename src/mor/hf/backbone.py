"""The network without its head, as libraries call it that bring a head and a loss of their own.

TRL's trainers compute ``log p`` from ``model.base_model(...).last_hidden_state`` and the head's
weight, tile by tile. They never see the loss that the model computes, so the routers' terms come in
by another door: they hang on the hidden states and enter with the backward pass.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutput

from mor.hf.arguments import CACHE_NAMES, take_known
from mor.model.model import MoRModel
from mor.model.routers.base import Router, active_router


class _AddedLoss(torch.autograd.Function):
    """A tensor as it is; in the backward pass, a gradient for the loss beside it.

    What comes from above is not looked at: it is some part of a loss that is not known here.
    """

    @staticmethod
    def forward(ctx: Any, values: Tensor, loss: Tensor, gradient: float) -> Tensor:
        ctx.like, ctx.gradient = loss.detach(), gradient
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, Tensor, None]:
        return gradients[0], torch.full_like(ctx.like, ctx.gradient), None


def hang_router_losses(values: Tensor, losses: dict[str, Tensor], router: Router) -> Tensor:
    """``values``, with the weighted router terms in their backward pass.

    The terms of a micro-batch are divided by ``router.micro_batches``, as TRL does with the
    balancing loss of experts, and multiplied by ``router.loss_scale``. (The model's own loss is
    exact where micro-batches differ in size: it weighs them by their targets, which are not known
    here.)

    Args:
        values: hidden states or logits that a loss is taken from elsewhere.
        losses: unweighted router terms by name.
        router: in use.
    """
    weighted = [router.loss_weight(name) * term for name, term in losses.items()]
    if not weighted or not values.requires_grad:
        return values
    total = torch.stack(weighted).sum() / router.micro_batches
    return _AddedLoss.apply(values, total, router.loss_scale)


class Backbone:
    """``MoRModel`` with Transformers' arguments and ``last_hidden_state`` after the final norm.

    In training the router terms hang on it: see :func:`hang_router_losses`.
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
        cu_seq_lens_q: Tensor | None = None,
        seq_idx: Tensor | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> BaseModelOutput | tuple:
        """Hidden states [B, T, D] for ids [B, T] or embeddings [B, T, D]; never a cache.

        Args:
            input_ids, attention_mask, inputs_embeds: as for :class:`mor.hf.MoRForCausalLM`.
            position_ids: [B, T].
            cu_seq_lens_q, seq_idx: see :func:`packed_documents`.
            return_dict: False for a tuple.
            logits_to_keep: nothing: there are no logits here, and callers cut hidden states
                themselves, as with every model of Transformers.
            kwargs: what :func:`mor.hf.arguments.take_known` lets through, ``use_cache=False`` too.

        Raises:
            ArgumentError: an unknown argument, or one that would ask for more than hidden states.
        """
        known = {"cu_seq_lens_q": cu_seq_lens_q}
        take_known("the model without its head", kwargs, _PARAMETERS, _ELSEWHERE, known)
        output = self._model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            positions=position_ids,
            inputs_embeds=inputs_embeds,
            document_ids=packed_documents(position_ids, attention_mask, cu_seq_lens_q, seq_idx),
        )
        hidden = self._model.norm(output.hidden)
        hidden = hang_router_losses(hidden, output.losses, active_router(self._model.router))
        result = BaseModelOutput(last_hidden_state=hidden)
        return result.to_tuple() if return_dict is False else result


_PARAMETERS = tuple(inspect.signature(Backbone.__call__).parameters)[1:-1]
_ELSEWHERE = dict.fromkeys(
    ("labels", "num_items_in_batch", "output_hidden_states", "use_cache"),
    "call the whole model for that",
) | dict.fromkeys(CACHE_NAMES, "call the whole model for that")


def packed_documents(
    position_ids: Tensor | None,
    attention_mask: Tensor | None,
    cu_seq_lens_q: Tensor | None,
    seq_idx: Tensor | None = None,
) -> Tensor | None:
    """Which document each token belongs to, from what Transformers' packing collators send.

    Args:
        position_ids: [B, T]; without a mask, a position that does not rise begins a document
            (``DataCollatorWithFlattening``).
        attention_mask: [B, T'] or None.
        cu_seq_lens_q: [documents + 1] where the documents of one row [1, T] begin, and the last
            one's end.
        seq_idx: [B, T] the answer itself.

    Returns:
        [B, T], or None where every row is one document.
    """
    if seq_idx is not None:
        return seq_idx if bool((seq_idx != seq_idx[..., :1]).any()) else None
    if cu_seq_lens_q is not None:
        if len(cu_seq_lens_q) < 3:
            return None
        places = torch.arange(int(cu_seq_lens_q[-1]), device=cu_seq_lens_q.device)
        return torch.bucketize(places, cu_seq_lens_q[1:-1], right=True)[None]
    if position_ids is None or attention_mask is not None or position_ids.shape[-1] < 2:
        return None
    if torch.compiler.is_exporting():  # a traced graph cannot branch on them: one document a row
        return None
    begins = torch.zeros_like(position_ids, dtype=torch.bool)
    begins[..., 1:] = position_ids[..., 1:] <= position_ids[..., :-1]
    return begins.cumsum(-1) if bool(begins.any()) else None
