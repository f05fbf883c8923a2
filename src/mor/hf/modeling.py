"""``MoRForCausalLM``: the network as Transformers' users expect it, nothing of its own inside."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationMixin, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from mor.config import MoRConfig
from mor.config.choices import Routing
from mor.hf.arguments import (
    CACHE_NAME,
    CACHE_NAMES,
    check_ids,
    check_length,
    one_cache,
    take_known,
)
from mor.hf.backbone import Backbone, hang_router_losses, packed_documents
from mor.hf.cache import MoRCache
from mor.hf.generation import DepthGeneration
from mor.hf.outputs import MoRCausalLMOutput
from mor.model.layers import RMSNorm
from mor.model.loss import combine_losses, exit_weights, next_token_targets
from mor.model.model import MoRModel
from mor.model.relaxation import Relaxation
from mor.model.routers import BoundaryRouter, TokenChoiceRouter
from mor.model.routers.base import active_router
from mor.model.routers.net import RouterNet
from mor.ops.alignment import align_weights
from mor.ops.cross_entropy import plain_cross_entropy


class MoRPreTrainedModel(PreTrainedModel):
    """What Transformers needs to know to make, save and load the model."""

    config: MoRConfig
    config_class = MoRConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _no_split_modules = ["DecoderLayer"]  # noqa: RUF012
    _skip_keys_device_placement = list(CACHE_NAMES)  # noqa: RUF012
    # Routers compare float32 numbers with float32 boundaries in every training dtype.
    _keep_in_fp32_modules_strict = ["router"]  # noqa: RUF012

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """As Transformers', the weights in aligned memory: see :mod:`mor.ops.alignment`."""
        loaded = super().from_pretrained(*args, **kwargs)
        align_weights(loaded[0] if isinstance(loaded, tuple) else loaded)
        return loaded

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """As PyTorch's; tensors that are taken over (``assign``) are laid in aligned memory."""
        found = super().load_state_dict(state_dict, strict=strict, assign=assign)
        if assign:
            align_weights(self)
        return found

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Normal(0, initializer_range) for matrices, ones for norms, constants for routers."""
        std = self.config.initializer_range
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, 0.0, std)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
            # A row of a loaded embedding no longer carries the mark that keeps it from being reset.
            loaded = getattr(module.weight, "_is_hf_initialized", False)
            if isinstance(module, nn.Embedding) and module.padding_idx is not None and not loaded:
                nn.init.zeros_(module.weight[module.padding_idx])
        elif isinstance(module, RMSNorm):
            nn.init.ones_(module.weight)
        elif isinstance(module, (Relaxation, RouterNet)):
            module.reset(std)
        elif isinstance(module, BoundaryRouter):
            nn.init.constant_(module.boundary, module.half_rule)
            nn.init.zeros_(module.boundary_steps)
        elif isinstance(module, TokenChoiceRouter):
            nn.init.zeros_(module.bias)


# GenerationMixin by its name: Transformers asks the direct parents whether a model can generate.
class MoRForCausalLM(MoRPreTrainedModel, DepthGeneration, GenerationMixin):
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

    def get_input_embeddings(self) -> nn.Module:
        """The token embedding."""
        return self.model.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the token embedding."""
        self.model.embed_tokens = value

    def get_output_embeddings(self) -> nn.Module:
        """The vocabulary projection."""
        return self.model.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
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
            position_ids: [B, T]; default counts the real tokens of each row.
            past_key_values, cache: a :class:`MoRCache`, by its old or its new name.
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
        cache = one_cache(past_key_values, cache)
        shift_labels, seq_idx = (kwargs.pop(name, None) for name in _MORE)
        inputs = inputs_embeds if input_ids is None else input_ids
        if kwargs:
            past = 0 if cache is None else cache.columns
            width = 0 if inputs is None else inputs.shape[1]
            known = {"cu_seq_lens_q": cu_seq_lens_q, "past": past, "width": width}
            take_known(type(self).__name__, kwargs, _PARAMETERS, context=known)
        check_ids(input_ids, self.config.vocab_size)
        if document_ids is None:
            positions = position_ids if cache is None else None
            document_ids = packed_documents(positions, attention_mask, cu_seq_lens_q, seq_idx)
        labelled = labels is not None or shift_labels is not None
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training and document_ids is None
        if cache is None and use_cache and not labelled:
            cache = MoRCache(self.config)
        check_length(inputs, attention_mask, cache, self.config.max_position_embeddings)
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        states = bool(output_hidden_states)
        output = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            positions=position_ids,
            cache=cache,
            inputs_embeds=inputs_embeds,
            document_ids=document_ids,
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
_PARAMETERS = (*tuple(inspect.signature(MoRForCausalLM.forward).parameters)[1:-1], *_MORE)


def _list_class(kind: type) -> None:
    """Put a class on Transformers' list of the names of causal language models.

    The Trainer's label smoothing, pipelines and model cards ask that list; the Auto classes do not
    fill it, and off it labels are not shifted. FSDP makes a subclass with a name of its own.
    """
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[f"mor:{kind.__name__}"] = kind.__name__


def register() -> None:
    """Make Transformers know ``model_type: mor``: the Auto classes, and the name of our class."""
    AutoConfig.register("mor", MoRConfig, exist_ok=True)
    AutoModelForCausalLM.register(MoRConfig, MoRForCausalLM, exist_ok=True)
    _list_class(MoRForCausalLM)
