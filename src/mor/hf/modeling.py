"""``MoRForCausalLM``: the network as Transformers' users expect it, nothing of its own inside."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from mor.config import MoRConfig
from mor.config.choices import Routing
from mor.hf.backbone import Backbone, packed_documents
from mor.hf.cache import MoRCache
from mor.model.layers import RMSNorm
from mor.model.loss import combine_losses, next_token_targets
from mor.model.model import MoRModel
from mor.model.recorder import DepthTrace
from mor.model.relaxation import Relaxation
from mor.model.routers import BoundaryRouter, TokenChoiceRouter
from mor.model.routers.base import active_router
from mor.model.routers.net import RouterNet
from mor.ops.cross_entropy import plain_cross_entropy


@dataclass
class MoRCausalLMOutput(CausalLMOutputWithPast):
    """Transformers' output plus what the routers did.

    Attributes:
        loss: total to back-propagate: language-model loss and weighted router losses.
        lm_loss: the language-model part, nats per token.
        router_losses: unweighted router terms by name (``aux_loss``, ``balancing_loss``, ...).
        depths: [B, T] recursions each token ran, 0 at padding.
        traces: scores and selections per depth, with ``output_router_traces=True``.
    """

    lm_loss: Tensor | None = None
    router_losses: dict[str, Tensor] | None = None
    depths: Tensor | None = None
    traces: tuple[DepthTrace, ...] | None = None


class MoRPreTrainedModel(PreTrainedModel):
    """What Transformers needs to know to make, save and load the model."""

    config: MoRConfig
    config_class = MoRConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _no_split_modules = ["DecoderLayer"]  # noqa: RUF012
    # Routers compare float32 numbers with float32 boundaries in every training dtype.
    _keep_in_fp32_modules_strict = ["router"]  # noqa: RUF012

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
        elif isinstance(module, Relaxation):
            module.reset(std)
        elif isinstance(module, RouterNet):
            for parameter in module.parameters(recurse=False):
                nn.init.normal_(parameter, 0.0, std)
        elif isinstance(module, BoundaryRouter):
            nn.init.constant_(module.boundary, module.half_rule)
            nn.init.zeros_(module.boundary_steps)
        elif isinstance(module, TokenChoiceRouter):
            nn.init.zeros_(module.bias)


class MoRForCausalLM(MoRPreTrainedModel, GenerationMixin):
    """Causal language model over :class:`mor.model.MoRModel`.

    ``forward`` adds three arguments: ``routing`` (``causal``, ``topk`` or ``full``; default
    top-k in training mode and causal otherwise), ``max_depth`` (a cap on recursions) and
    ``output_router_traces``.
    """

    _tied_weights_keys = {"model.lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012
    accepts_loss_kwargs = True

    def __init__(self, config: MoRConfig) -> None:
        super().__init__(config)
        self.model = MoRModel(config)
        self.post_init()

    @property
    def base_model(self) -> Any:
        """The network without its head, as TRL calls it."""
        return Backbone(self.model)

    def get_input_embeddings(self) -> nn.Module:
        """The embedding."""
        return self.model.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the embedding."""
        self.model.embed_tokens = value

    def get_output_embeddings(self) -> nn.Module:
        """The head."""
        return self.model.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Replace the head."""
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
        **kwargs: Any,
    ) -> MoRCausalLMOutput | tuple:
        """Logits, loss, depths and cache for ids [B, T].

        Args:
            input_ids: [B, T]; or ``inputs_embeds`` [B, T, D].
            attention_mask: [B, T'] with 1 for real tokens; the last T columns are these tokens'.
            position_ids: [B, T]; default counts the real tokens of each row.
            past_key_values: a :class:`MoRCache`.
            document_ids: [B, T], where several documents share a row and must not see each other.
                Transformers' own ways to say so are understood too: ``cu_seq_lens_q`` and, without
                a mask and a cache, positions that start again within a row.
            labels: [B, T], shifted inside, -100 where there is no target.
            use_cache: return a cache; default the configuration's, and False while training.
            logits_to_keep: last positions (or indices) that get logits; 0 for all.
            return_logits: False, with labels, for the loss alone: the logits are then made and
                used a chunk at a time, and are None in the output.
            routing, max_depth: see the class.
            output_hidden_states: also return the stream at the seams of the stages.
            output_router_traces: also return scores and selections per depth.
            num_items_in_batch: targets in the whole optimiser step, from the Trainer.

        Raises:
            ValueError: wrong shapes, a token id out of range, a foreign cache, too long a sequence.
        """
        self._check_ids(input_ids)
        if document_ids is None and past_key_values is None:
            document_ids = packed_documents(position_ids, attention_mask, cu_seq_lens_q)
        wanted = self.config.use_cache and not self.training and document_ids is None
        wanted = wanted if use_cache is None else use_cache
        cache = past_key_values
        if cache is not None and not isinstance(cache, MoRCache):
            raise ValueError(
                f"past_key_values is a {type(cache).__name__}; MoR caches per depth: use MoRCache"
            )
        if cache is None and wanted and labels is None:
            cache = MoRCache(self.config)
        self._check_length(inputs_embeds if input_ids is None else input_ids, attention_mask, cache)
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
        )
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = loss = lm_loss = None
        if return_logits or labels is None:
            logits = self.model.head(output.hidden[:, keep])
        if labels is not None:
            targets = next_token_targets(labels)
            if logits is None:
                summed = self.model.head_loss(output.hidden, targets)
            else:
                summed = plain_cross_entropy(logits.flatten(0, -2), targets)
            router = active_router(self.model.router)
            parts = combine_losses(summed, targets, router, output.losses, num_items_in_batch)
            loss, lm_loss = parts.total, parts.lm
        if states:
            output.states.append(self.model.norm(output.hidden))
        result = MoRCausalLMOutput(
            loss=loss,
            logits=logits,
            past_key_values=cache,
            hidden_states=tuple(output.states) if states else None,
            lm_loss=lm_loss,
            router_losses=output.losses or None,
            depths=output.depths,
            traces=tuple(output.traces) if output_router_traces else None,
        )
        return result.to_tuple() if return_dict is False else result

    def _check_ids(self, input_ids: Tensor | None) -> None:
        # A wrong id on a GPU kills the process long after; there the check would cost a sync.
        if input_ids is None or input_ids.device.type != "cpu" or not input_ids.numel():
            return
        low, high = int(input_ids.min()), int(input_ids.max())
        if low < 0 or high >= self.config.vocab_size:
            raise ValueError(
                f"input_ids holds token id {low if low < 0 else high}; "
                f"vocab_size={self.config.vocab_size} allows 0..{self.config.vocab_size - 1}"
            )

    def _check_length(
        self, inputs: Tensor | None, attention_mask: Tensor | None, cache: MoRCache | None
    ) -> None:
        limit, width = self.config.max_position_embeddings, 0 if inputs is None else inputs.shape[1]
        if width + (0 if cache is None else cache.columns) <= limit:
            return
        # Padding is no token: only now that it matters are the real ones counted.
        seen = 0 if cache is None or cache.seen is None else cache.seen
        real = torch.tensor(width) if attention_mask is None else attention_mask[:, -width:].sum(1)
        tokens = int((real + seen).max())
        if tokens > limit:
            raise ValueError(
                f"the sequence is {tokens} tokens long, past max_position_embeddings={limit}"
            )

    def _prepare_cache_for_generation(  # type: ignore[override]
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        """``generate`` decodes through a :class:`MoRCache`."""
        given = model_kwargs.get("past_key_values")
        if generation_config.cache_implementation is not None:
            raise ValueError(
                f"cache_implementation={generation_config.cache_implementation!r} is not available:"
                " MoR caches per depth; leave it out"
            )
        if given is None and generation_config.use_cache is not False:
            model_kwargs["past_key_values"] = MoRCache(self.config)


def register() -> None:
    """Make AutoConfig and AutoModelForCausalLM know ``model_type: mor``."""
    AutoConfig.register("mor", MoRConfig, exist_ok=True)
    AutoModelForCausalLM.register(MoRConfig, MoRForCausalLM, exist_ok=True)
