"""``MoRForCausalLM``: the network as Transformers' users expect it, nothing of its own inside."""

from __future__ import annotations

import functools
import inspect
from typing import Any

from torch import Tensor, nn
from transformers import GenerationMixin
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from mor.config import MoRConfig
from mor.config.choices import Routing
from mor.hf.arguments import (
    CACHE_NAME,
)
from mor.hf.backbone import Backbone, hang_router_losses
from mor.hf.cache import MoRCache
from mor.hf.generation import DepthGeneration
from mor.hf.network import call_network
from mor.hf.outputs import MoRCausalLMOutput
from mor.hf.pretrained import MoRPreTrainedModel
from mor.model.loss import combine_losses, exit_weights, next_token_targets
from mor.model.model import MoRModel
from mor.model.routers.base import active_router
from mor.ops.cross_entropy import plain_cross_entropy


# GenerationMixin by its name: Transformers asks the direct parents whether a model can generate.
class MoRForCausalLM(MoRPreTrainedModel, DepthGeneration, GenerationMixin):  # type: ignore[misc]
    """Causal language model over :class:`mor.model.MoRModel`.

    ``forward`` adds three arguments: ``routing`` (``causal``, ``topk`` or ``full``; default
    top-k in training mode and causal otherwise), ``max_depth`` (a cap on recursions) and
    ``output_router_traces``.
    """

    _tied_weights_keys = {"model.lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012
    accepts_loss_kwargs = True

    def __init__(self, config: MoRConfig) -> None:
        super().__init__(config)
        # Read off the class's name otherwise; by it the Trainer knows that labels are shifted
        # inside, when it counts the targets of a step.
        self.loss_type = "ForCausalLM"
        self.model = MoRModel(config)
        self.post_init()

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        _list_class(cls)

    @property
    def base_model(self) -> Any:
        """The network without its head, as TRL calls it."""
        return Backbone(self.model)

    def get_output_embeddings(self) -> nn.Module:
        """The vocabulary projection."""
        return self.model.lm_head

    def set_output_embeddings(self, new_embeddings: Any) -> None:
        """Replace the vocabulary projection."""
        self.model.lm_head = new_embeddings

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: MoRCache | None = None,
        inputs_embeds: Tensor | None = None,
        document_ids: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        return_logits: bool = True,
        routing: Routing | None = None,
        max_depth: int | None = None,
        output_hidden_states: bool | None = None,
        output_router_traces: bool = False,
        num_items_in_batch: Tensor | int | None = None,
        return_dict: bool | None = None,
        cu_seq_lens_q: Tensor | None = None,
        cache: MoRCache | None = None,
        **kwargs: Any,
    ) -> MoRCausalLMOutput | tuple:
        """Logits, loss, depths and cache for ids [B, T].

        Args:
            input_ids: [B, T]; or ``inputs_embeds`` [B, T, D].
            attention_mask: [B, T'] with 1 for real tokens; the last T columns are these tokens'.
            position_ids: [B, T]; default counts the real tokens of each row or document.
            past_key_values, cache: a :class:`MoRCache`, by its old or its new name; an empty
                ``DynamicCache`` becomes one.
            document_ids: [B, T], where several documents share a row and must not see each other.
                Transformers' own ways to say so are understood too: ``cu_seq_lens_q``, ``seq_idx``
                and, without a mask and a cache, positions that start again within a row.
            labels: [B, T], shifted inside, -100 where there is no target. Or ``shift_labels``
                [B, T], shifted already.
            use_cache: return a cache; default the configuration's, and False while training.
            logits_to_keep: last positions (or indices) that get logits; 0 for all.
            return_logits: False, with labels, for the loss alone: the logits are then made and
                used a chunk at a time, and are None in the output.
            routing, max_depth: see the class.
            output_hidden_states: also return the stream at the seams of the stages; default the
                configuration's, as for ``return_dict``.
            output_router_traces: also return scores and selections per depth.
            num_items_in_batch: targets in the whole optimiser step, from the Trainer. Without
                labels it says that the Trainer takes a loss of its own from the logits: the router
                terms then hang on them, and ``router_losses`` in the output are for reading only.
            kwargs: other arguments that Transformers documents, as long as they change nothing
                (:func:`mor.hf.arguments.take_known`).

        Raises:
            ArgumentError: an unknown argument, one that is not supported, a foreign cache.
            ValueError: wrong shapes, a token id out of range, too long a sequence.
        """
        shift_labels, seq_idx = (kwargs.pop(name, None) for name in _MORE)
        labelled = labels is not None or shift_labels is not None
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        states = bool(output_hidden_states)
        output, cache = call_network(
            type(self).__name__,
            self.model,
            {
                "input_ids": input_ids,
                "attention_mask": attention_mask,
                "position_ids": position_ids,
                "past_key_values": past_key_values,
                "inputs_embeds": inputs_embeds,
                "document_ids": document_ids,
                "cu_seq_lens_q": cu_seq_lens_q,
                "cache": cache,
                "seq_idx": seq_idx,
            },
            kwargs,
            _parameters(type(self)),  # type: ignore[arg-type]
            use_cache=False if labelled else use_cache,
            by_default=self.config.use_cache and not self.training,
            routing=routing,
            max_depth=max_depth,
            keep_states=states,
            keep_traces=output_router_traces,
            exits=exit_weights(self.config) if labelled and self.training else (),
        )
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        router, router_losses = active_router(self.model.router), output.losses
        logits = loss = lm_loss = exit_losses = None
        if return_logits or not labelled:
            logits = self.model.head(output.hidden[:, keep])
        if labelled:
            targets = next_token_targets(labels, shift_labels)
            if logits is None:
                summed = self.model.head_loss(output.hidden, targets)
            else:
                summed = plain_cross_entropy(logits.flatten(0, -2), targets)
            exits = {
                passes: self.model.head_loss(hidden, targets)
                for passes, hidden in output.exits.items()
                if hidden is not output.hidden
            }
            parts = combine_losses(
                summed, targets, router, router_losses, num_items_in_batch, exits
            )
            loss, lm_loss, exit_losses = parts.total, parts.lm, parts.exits
        elif self.training and (num_items_in_batch is not None or router.loss_elsewhere):
            assert logits is not None
            logits = hang_router_losses(logits, router_losses, router)
            router_losses = {name: term.detach() for name, term in router_losses.items()}
        if states:
            output.states.append(self.model.norm(output.hidden))
        result = MoRCausalLMOutput(
            loss=loss,
            logits=logits,
            hidden_states=tuple(output.states) if states else None,
            lm_loss=lm_loss,
            router_losses=router_losses or None,
            exit_losses=exit_losses or None,
            depths=output.depths,
            traces=tuple(output.traces) if output_router_traces else None,
            **{CACHE_NAME: cache},  # type: ignore[arg-type]
        )
        as_object = self.config.return_dict if return_dict is None else return_dict
        return result if as_object is not False else result.to_tuple()


# Understood, but no parameters: a Trainer takes every parameter with "label" in its name for a
# column that evaluation cannot do without.
_MORE = ("shift_labels", "seq_idx")


@functools.cache
def _parameters(kind: Any) -> tuple[str, ...]:
    """The names that a class's forward takes."""
    return (*tuple(inspect.signature(kind.forward).parameters)[1:-1], *_MORE)


def _list_class(kind: type) -> None:
    """Put a class on Transformers' list of the names of causal language models.

    The Trainer's label smoothing, pipelines and model cards ask that list; the Auto classes do not
    fill it, and off it labels are not shifted. FSDP makes a subclass with a name of its own.
    """
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[f"mor:{kind.__name__}"] = kind.__name__


_list_class(MoRForCausalLM)
