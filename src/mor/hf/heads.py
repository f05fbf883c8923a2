"""The network for other ends than the next token: hidden states, and classes or rewards.

Weights have the names that they have in :class:`mor.hf.MoRForCausalLM`, so that a folder of one
loads as another; there is no vocabulary projection here.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from mor.config import MoRConfig
from mor.config.choices import Routing
from mor.hf.arguments import CACHE_NAME
from mor.hf.backbone import hang_router_losses
from mor.hf.cache import MoRCache
from mor.hf.network import call_network
from mor.hf.outputs import MoRBaseOutput, MoRClassifierOutput
from mor.hf.pretrained import MoRPreTrainedModel
from mor.model.model import MoRModel
from mor.model.routers.base import active_router

# A forward's named parameters that go with the tokens.
_TOKENS = ("input_ids", "attention_mask", "position_ids", "past_key_values", "inputs_embeds")
# What a forward of ours may be given beside its named parameters.
_MORE = ("document_ids", "cu_seq_lens_q", "seq_idx", "cache", "pixel_values", "input_features")


class Headless(MoRPreTrainedModel):
    """What both classes below are: the network without its vocabulary projection."""

    _keys_to_ignore_on_load_unexpected = [r"model\.lm_head\."]  # noqa: RUF012

    def __init__(self, config: MoRConfig) -> None:
        super().__init__(config)
        self.model = MoRModel(config)
        self.model.lm_head = nn.Identity()  # type: ignore[assignment]

    def _hidden(
        self,
        tokens: tuple[Any, ...],
        kwargs: dict[str, Any],
        options: dict[str, Any],
        states: bool | None,
        accepted: tuple[str, ...],
    ) -> MoRBaseOutput:
        """Run the network; hidden states [B, T, D] after the final norm.

        Args:
            tokens: the arguments :data:`_TOKENS` of the forward.
            kwargs: its other arguments; those that belong to the tokens are taken out.
            options: ``use_cache``, ``routing``, ``max_depth``.
            states: whether to keep the stream at the seams; default the configuration's.
            accepted: the names of its parameters.
        """
        inputs = dict(zip(_TOKENS, tokens, strict=True))
        inputs |= {name: kwargs.pop(name) for name in _MORE if name in kwargs}
        kwargs.pop("logits_to_keep", None)  # there are no logits per token to keep or leave
        if states is None:
            states = self.config.output_hidden_states
        output, cache = call_network(
            type(self).__name__,
            self.model,
            inputs,
            kwargs,
            (*accepted, *_MORE),
            keep_states=bool(states),
            **options,
        )
        last = self.model.norm(output.hidden)
        return MoRBaseOutput(
            last_hidden_state=last,
            hidden_states=(*output.states, last) if states else None,
            router_losses=output.losses or None,
            depths=output.depths,
            **{CACHE_NAME: cache},  # type: ignore[arg-type]
        )

    def _shown(self, output: Any, return_dict: bool | None) -> Any:
        as_object = self.config.return_dict if return_dict is None else return_dict
        return output if as_object is not False else output.to_tuple()


class MoRBaseModel(Headless):
    """Hidden states of :class:`mor.model.MoRModel`, for embeddings and heads of one's own.

    What ``AutoModel`` makes of a folder.
    """

    modalities = ("text", "image", "audio")
    head_types = ("vocabulary", "classes", "regression")

    def __init__(self, config: MoRConfig) -> None:
        super().__init__(config)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: MoRCache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        routing: Routing | None = None,
        max_depth: int | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> MoRBaseOutput | tuple:
        """Hidden states [B, T, D] after the final norm for ids [B, T].

        In training the weighted router losses enter with the backward pass of the hidden states.

        Args:
            input_ids, attention_mask, position_ids, inputs_embeds, past_key_values, routing,
                max_depth, output_hidden_states, return_dict: as for
                :class:`mor.hf.MoRForCausalLM`.
            use_cache: True for a cache in the output.
            kwargs: ``pixel_values`` [B, C, H, W] or ``input_features`` [B, frames, bins] in place
                of ids; ``document_ids``, ``cu_seq_lens_q``, ``seq_idx``, ``cache``, and what
                Transformers documents as long as it changes nothing.

        Raises:
            ArgumentError: an unknown argument, one that is not supported, a foreign cache.
            ValueError: wrong shapes, a token id out of range, too long a sequence.
        """
        tokens = (input_ids, attention_mask, position_ids, past_key_values, inputs_embeds)
        options = {"use_cache": use_cache, "routing": routing, "max_depth": max_depth}
        output = self._hidden(tokens, kwargs, options, output_hidden_states, _BASE_PARAMETERS)
        if self.training and output.router_losses:
            hidden: Any = output.last_hidden_state
            router, losses = active_router(self.model.router), output.router_losses
            output.last_hidden_state = hang_router_losses(hidden, losses, router)
            output.router_losses = {name: term.detach() for name, term in losses.items()}
        return self._shown(output, return_dict)


class MoRForSequenceClassification(Headless):
    """A linear map on the last token's hidden state: classes, several labels, a number, a reward.

    What ``AutoModelForSequenceClassification`` makes of a folder. ``config.num_labels`` and
    ``config.problem_type`` mean what they mean in Transformers.
    """

    # The loss is the mean over the rows of one call; the Trainer averages over micro-batches.
    accepts_loss_kwargs = False

    def __init__(self, config: MoRConfig) -> None:
        super().__init__(config)
        self.loss_type = "ForSequenceClassification"
        self.num_labels = config.num_labels or 1
        self.score = nn.Linear(config.hidden_size, self.num_labels, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: MoRCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        routing: Routing | None = None,
        max_depth: int | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> MoRClassifierOutput | tuple:
        """Logits [B, num_labels] at the last real token of each row, and the loss.

        The last real token is the last one of the ``attention_mask``; without a mask, the last that
        is not ``config.pad_token_id``. In training the weighted router losses are part of the loss;
        without labels they enter with the backward pass of the logits.

        Args:
            input_ids, attention_mask, position_ids, inputs_embeds, past_key_values, routing,
                max_depth, output_hidden_states, return_dict: as for
                :class:`mor.hf.MoRForCausalLM`.
            labels: [B] classes or numbers, or [B, num_labels].
            use_cache: True for a cache in the output.
            kwargs: ``document_ids``, ``cu_seq_lens_q``, ``seq_idx``, ``cache``, and what
                Transformers documents as long as it changes nothing.

        Raises:
            ArgumentError: an unknown argument, one that is not supported, a foreign cache.
            ValueError: wrong shapes, a token id out of range, too long a sequence; several rows
                without a mask and without a padding token.
        """
        tokens = (input_ids, attention_mask, position_ids, past_key_values, inputs_embeds)
        options = {"use_cache": use_cache, "routing": routing, "max_depth": max_depth}
        output = self._hidden(tokens, kwargs, options, output_hidden_states, _SCORE_PARAMETERS)
        hidden: Any = output.last_hidden_state
        last = last_real(hidden, attention_mask, input_ids, self.config.pad_token_id)
        logits = self.score(hidden[torch.arange(len(hidden), device=hidden.device), last])
        router, losses, loss = active_router(self.model.router), output.router_losses or {}, None
        if labels is not None:
            loss = self.loss_function(
                logits=logits, labels=labels, pooled_logits=logits, config=self.config
            )
            for name, term in losses.items():
                loss = loss + router.loss_weight(name) * term
        elif self.training:
            logits = hang_router_losses(logits, losses, router)
            losses = {name: term.detach() for name, term in losses.items()}
        result = MoRClassifierOutput(
            loss=loss,
            logits=logits,
            hidden_states=output.hidden_states,
            router_losses=losses or None,
            depths=output.depths,
            **{CACHE_NAME: output.get(CACHE_NAME)},
        )
        return self._shown(result, return_dict)


def last_real(
    hidden: Tensor, mask: Tensor | None, input_ids: Tensor | None, padding: int | None
) -> Tensor:
    """[B] the column of each row's last real token.

    Args:
        hidden: [B, T, D].
        mask: [B, T'] whose last T columns are these tokens', or None.
        input_ids: [B, T], looked at where there is no mask; None for embeddings.
        padding: the padding token, if there is one.

    Raises:
        ValueError: several rows, and nothing says where they end.
    """
    rows, width = hidden.shape[:2]
    if mask is not None:
        real = mask[:, -width:].bool()
    elif input_ids is not None and padding is not None:
        real = input_ids != padding
    elif rows == 1:
        return hidden.new_full((1,), width - 1, dtype=torch.long)
    else:
        raise ValueError(
            f"{rows} rows, and nothing says where each ends: give an attention_mask, or set "
            "config.pad_token_id and give input_ids"
        )
    return (real * torch.arange(width, device=hidden.device)).argmax(-1)


def _parameters(kind: type) -> tuple[str, ...]:
    forward: Any = kind.forward  # type: ignore[attr-defined]
    return tuple(inspect.signature(forward).parameters)[1:-1]


_BASE_PARAMETERS = _parameters(MoRBaseModel)
_SCORE_PARAMETERS = _parameters(MoRForSequenceClassification)
