"""The next patch of an image, or the next frames of a sound: training without labels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mor.config.choices import Routing
from mor.hf.media import MediaModel
from mor.hf.outputs import MoRMediaOutput
from mor.model.front import align_frames, modality_of


class MoRForNextFrame(MediaModel):
    """The next patch of an image, or the next frames of a sound, from those before (regression).

    What ``AutoModelForPreTraining`` makes of a folder. Depth is chosen as in language models:
    training selects, inference decides by each token alone.
    """

    main_input_name = "pixel_values"
    head_types = ("regression",)

    def forward(
        self,
        pixel_values: Tensor | None = None,
        input_features: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        routing: Routing | None = None,
        max_depth: int | None = None,
        output_hidden_states: bool | None = None,
        output_router_traces: bool = False,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> MoRMediaOutput | tuple:
        """Predictions [B, T, W] of what follows each token, and their mean square error.

        Args:
            pixel_values: [B, C, H, W], or
            input_features: [B, frames, num_mel_bins] with ``attention_mask``.
            attention_mask: [B, frames], 1 for real frames.
            labels: not looked at: the input is its own target, and there is always a loss.
            routing, max_depth, output_hidden_states, output_router_traces, return_dict, kwargs: as
                for :class:`MoRForImageClassification`.

        Raises:
            ArgumentError: an unknown argument, or one that is not supported.
            ValueError: wrong inputs, or a sound of one token, which nothing follows.
        """
        image = self.config.modality == "image"
        features = pixel_values if image else input_features
        states = bool(
            self.config.output_hidden_states
            if output_hidden_states is None
            else output_hidden_states
        )
        options = {
            "attention_mask": attention_mask, "routing": routing, "max_depth": max_depth,
            "keep_states": states, "keep_traces": output_router_traces,
        }  # fmt: skip
        name = "pixel_values" if image else "input_features"
        output = self._run(features, name, kwargs, True, options)
        assert features is not None
        targets, told = next_targets(self.model.embed_tokens, features, attention_mask)
        logits = self.model.head(output.hidden)

        def loss_of(predicted: Tensor) -> Tensor:
            error = (predicted[:, :-1].float() - targets).square().mean(-1)
            return (error * told).sum() / told.sum().clamp(min=1)

        losses = self._losses(output, logits, loss_of)
        return self._finish(output, losses, logits, states, output_router_traces, return_dict)


@torch.no_grad()
def next_targets(front: Any, features: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """What a regression head has to predict: [B, T - 1, W], and which of it counts, [B, T - 1].

    Token t of a sound has seen the frames up to t x stride; what follows are the next ``stride``.
    """
    if modality_of(front) == "image":
        patches = front.cut(features).float()[:, 1:]
        return patches, torch.ones(patches.shape[:2], device=patches.device)
    frames, lengths = align_frames(front.check(features), mask)
    batch, total, bins = frames.shape
    count = -(-total // front.step) - 1
    ahead = frames[:, 1 : 1 + count * front.step].float()
    targets = ahead.reshape(batch, count, front.step * bins)
    ends = torch.full((batch,), total, device=frames.device) if lengths is None else lengths
    places = torch.arange(1, count + 1, device=frames.device) * front.step
    return targets, (places < ends[:, None]).float()
