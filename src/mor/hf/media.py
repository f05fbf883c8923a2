"""Images and sounds as Transformers' users expect them: their classes.

The network is the one of :class:`mor.hf.MoRForCausalLM`, with another front end and another head
(:mod:`mor.model.front`, :mod:`mor.model.ends`); no layer is added here.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from mor.config import MoRConfig
from mor.config.choices import Routing
from mor.hf.arguments import take_known
from mor.hf.backbone import hang_router_losses
from mor.hf.outputs import MoRMediaOutput
from mor.hf.pretrained import MoRPreTrainedModel
from mor.model.loss import exit_weights
from mor.model.model import MoRModel
from mor.model.output import ModelOutput
from mor.model.routers.base import active_router

_OF_TEXT = dict.fromkeys(
    ("cache", "input_ids", "inputs_embeds", "num_items_in_batch", "past_key_values", "position_ids",
     "use_cache"),
    "it is for texts",
)  # fmt: skip


class MediaModel(MoRPreTrainedModel):
    """What the classes below are: the network over pixels or frames, and a loss at its head."""

    # The loss is the mean over the rows of one call; the Trainer averages over micro-batches.
    accepts_loss_kwargs = False
    modalities: tuple[str, ...] = ("image", "audio")
    head_types: tuple[str, ...] = ("classes",)

    def __init__(self, config: MoRConfig) -> None:
        super().__init__(config)
        self.loss_type = "ForSequenceClassification"
        self.num_labels = config.num_labels or 1
        self.model = MoRModel(config)
        self.post_init()

    @property
    def classifier(self) -> nn.Module:
        """The head's linear map."""
        return self.model.lm_head

    def _run(
        self,
        features: Tensor | None,
        name: str,
        kwargs: dict[str, Any],
        labelled: bool,
        options: dict[str, Any],
    ) -> ModelOutput:
        """Check the arguments of a forward, then run the network up to its coda.

        Args:
            features: pixels or frames.
            name: of their argument.
            kwargs: what the forward has no parameter for; it must change nothing.
            labelled: whether there is a loss to take, at earlier exits too.
            options: for :class:`mor.model.MoRModel`.
        """
        parameters = tuple(inspect.signature(type(self).forward).parameters)[1:-1]
        take_known(type(self).__name__, kwargs, parameters, _OF_TEXT)
        if features is None:
            raise ValueError(f"{type(self).__name__} needs {name}")
        output: ModelOutput = self.model(
            features=features,
            exits=exit_weights(self.config) if labelled and self.training else (),
            **options,
        )
        limit = self.config.max_position_embeddings
        if output.hidden.shape[1] > limit:
            raise ValueError(
                f"{name} makes {output.hidden.shape[1]} tokens; max_position_embeddings={limit}"
            )
        return output

    def _losses(
        self, output: ModelOutput, logits: Tensor, loss_of: Callable[[Tensor], Tensor]
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """``loss_of`` the head's answers at the end, and at earlier exits by number of passes."""
        early = {
            passes: loss_of(self.model.head(hidden, output.real))
            for passes, hidden in output.exits.items()
            if hidden is not output.hidden
        }
        return loss_of(logits), early

    def _finish(
        self,
        output: ModelOutput,
        losses: tuple[Tensor, dict[int, Tensor]] | None,
        logits: Tensor,
        states: bool,
        traces: bool,
        return_dict: bool | None,
    ) -> MoRMediaOutput | tuple:
        """Put losses and what was asked for together.

        Args:
            output: of the network.
            losses: of the labels at the end, and at earlier exits by number of recursions.
            logits: of the head.
            states, traces: whether they were asked for.
            return_dict: False for a tuple; default the configuration's.
        """
        router, terms = active_router(self.model.router), output.losses
        loss = label_loss = None
        if losses is not None:
            label_loss = losses[0]
            loss = label_loss.clone()
            for name, term in terms.items():
                loss = loss + router.loss_weight(name) * term
            for passes, early in losses[1].items():
                loss = loss + exit_weights(self.config)[passes] * early
        elif self.training:
            logits = hang_router_losses(logits, terms, router)
            terms = {name: term.detach() for name, term in terms.items()}
        if states:
            output.states.append(self.model.norm(output.hidden))
        result = MoRMediaOutput(
            loss=loss,
            logits=logits,
            hidden_states=tuple(output.states) if states else None,
            label_loss=label_loss,
            router_losses=terms or None,
            exit_losses=None if losses is None else losses[1] or None,
            depths=output.depths,
            token_mask=output.real,
            traces=tuple(output.traces) if traces else None,
        )
        as_object = self.config.return_dict if return_dict is None else return_dict
        return result if as_object is not False else result.to_tuple()

    def _classify(
        self,
        features: Tensor | None,
        name: str,
        mask: Tensor | None,
        labels: Tensor | None,
        kwargs: dict[str, Any],
        *,
        states: bool | None,
        traces: bool,
        return_dict: bool | None,
        **options: Any,
    ) -> MoRMediaOutput | tuple:
        """Logits [B, num_labels], and the loss of labels [B] or [B, num_labels]."""
        states = bool(self.config.output_hidden_states if states is None else states)
        options |= {"attention_mask": mask, "keep_states": states, "keep_traces": traces}
        output = self._run(features, name, kwargs, labels is not None, options)
        logits = self.model.head(output.hidden, output.real)
        losses = None
        if labels is not None:

            def loss_of(these: Tensor) -> Tensor:
                given = {"labels": labels, "pooled_logits": these, "config": self.config}
                found: Tensor = self.loss_function(logits=these, **given)
                return found

            losses = self._losses(output, logits, loss_of)
        return self._finish(output, losses, logits, states, traces, return_dict)


class MoRForImageClassification(MediaModel):
    """Classes of images: patches, every one with its own depth, pooled after the last layer.

    What ``AutoModelForImageClassification`` makes of a folder. ``forward`` adds ``routing``
    (``causal``: each patch by its own boundary; ``topk``: the best of the image; ``full``),
    ``max_depth`` and ``output_router_traces``.
    """

    main_input_name = "pixel_values"
    input_modalities = "image"
    modalities = ("image",)

    def forward(
        self,
        pixel_values: Tensor | None = None,
        labels: Tensor | None = None,
        routing: Routing | None = None,
        max_depth: int | None = None,
        output_hidden_states: bool | None = None,
        output_router_traces: bool = False,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> MoRMediaOutput | tuple:
        """Logits [B, num_labels] of pixels [B, C, H, W].

        Args:
            pixel_values: as the image processor beside the model makes them.
            labels: [B] classes or numbers, or [B, num_labels]; as ``config.problem_type`` says.
            routing: default ``topk`` in training and for expert choice in an encoder, else
                ``causal``.
            max_depth: cap on recursions, 1..R.
            output_hidden_states: also return the stream [B, T, D] at the seams of the stages.
            output_router_traces: also return scores and selections per depth.
            return_dict: False for a tuple.
            kwargs: what Transformers documents, as long as it changes nothing.

        Raises:
            ArgumentError: an unknown argument, or one that is not supported.
            ValueError: no pixels, or of a shape that the configuration does not name.
        """
        return self._classify(
            pixel_values, "pixel_values", None, labels, kwargs, routing=routing,
            max_depth=max_depth, states=output_hidden_states, traces=output_router_traces,
            return_dict=return_dict,
        )  # fmt: skip


class MoRForAudioClassification(MediaModel):
    """Classes of sounds: frames, a strided convolution, every token with its own depth.

    What ``AutoModelForAudioClassification`` makes of a folder. See
    :class:`MoRForImageClassification` for what ``forward`` adds.
    """

    main_input_name = "input_features"
    input_modalities = "audio"
    modalities = ("audio",)

    def forward(
        self,
        input_features: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        input_values: Tensor | None = None,
        routing: Routing | None = None,
        max_depth: int | None = None,
        output_hidden_states: bool | None = None,
        output_router_traces: bool = False,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> MoRMediaOutput | tuple:
        """Logits [B, num_labels] of frames [B, T, num_mel_bins].

        Args:
            input_features: frames; Whisper's [B, num_mel_bins, T] is understood too.
            attention_mask: [B, T], 1 for real frames, wherever padding stands. What is padding
                changes nothing.
            labels: as for :class:`MoRForImageClassification`.
            input_values: another name of ``input_features`` (``ASTFeatureExtractor`` uses it).
            routing, max_depth, output_hidden_states, output_router_traces, return_dict, kwargs: as
                for :class:`MoRForImageClassification`.

        Raises:
            ArgumentError: an unknown argument, or one that is not supported.
            ValueError: no frames, frames of another width, or a row that is all padding.
        """
        if input_features is not None and input_values is not None:
            raise ValueError("input_features and input_values are two names of one input; give one")
        frames = input_values if input_features is None else input_features
        return self._classify(
            frames, "input_features", attention_mask, labels, kwargs, routing=routing,
            max_depth=max_depth, states=output_hidden_states, traces=output_router_traces,
            return_dict=return_dict,
        )  # fmt: skip
