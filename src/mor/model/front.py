"""What a token is made of: an id, a patch of an image, a few frames of a sound.

:func:`build_front` makes the module that ``MoRModel.embed`` calls; :func:`read_inputs` takes what a
forward is given to the stream [B, T, D].
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mor.config import MoRConfig
from mor.model.stem import build_stem


class PatchEmbedding(nn.Module):
    """Patches of an image by one linear map, with a learned vector per row and per column.

    With ``stem_channels`` convolutions come first, and the map reads their channels at each patch.

    Args:
        config: ``image_size``, ``patch_size``, ``num_channels``, ``hidden_size``, ``stem_channels``
            and ``stem_strides`` count.
    """

    modality = "image"

    def __init__(self, config: MoRConfig) -> None:
        super().__init__()
        self.image, self.patch = config.image_shape, config.patch_shape
        self.channels = config.num_channels
        rows, columns = config.patch_grid
        width = config.hidden_size
        self.stem = build_stem(config) if config.stem_channels else None
        self.projection = nn.Linear(config.patch_width, width)
        self.row_embedding = nn.Embedding(rows, width)
        self.column_embedding = nn.Embedding(columns, width)

    def check(self, pixels: Tensor) -> Tensor:
        """``pixels`` [B, C, H, W] as they are.

        Raises:
            ValueError: images of another shape.
        """
        wanted = (self.channels, *self.image)
        if pixels.dim() != 4 or tuple(pixels.shape[1:]) != wanted:
            raise ValueError(
                f"pixel_values has shape {tuple(pixels.shape)}; this model takes "
                f"[B, {', '.join(map(str, wanted))}]: num_channels, then height and width"
            )
        return pixels

    def cut(self, pixels: Tensor) -> Tensor:
        """Pixels [B, C, H, W] -> patches [B, N, C h w], row by row.

        Raises:
            ValueError: images of another shape.
        """
        return F.unfold(self.check(pixels), self.patch, stride=self.patch).transpose(1, 2)

    def forward(self, pixels: Tensor) -> Tensor:
        """Pixels [B, C, H, W] -> stream [B, N, D]."""
        pixels = pixels.to(self.projection.weight.dtype)
        if self.stem is None:
            hidden = self.projection(self.cut(pixels))
        else:
            hidden = self.projection(self.stem(self.check(pixels)).flatten(2).transpose(1, 2))
        places = self.row_embedding.weight[:, None] + self.column_embedding.weight[None]
        return hidden + places.flatten(0, 1)


class FrameEmbedding(nn.Module):
    """Frames of a sound by strided convolutions, GELU between them.

    Each keeps ceil(frames / stride) places. What lies beyond a sound's ends counts as zero, so that
    padding changes nothing. A causal model's kernels look back alone.

    Attributes:
        bins: numbers per frame.
        step: frames from one token to the next. strides: of each convolution.
    """

    modality = "audio"

    def __init__(self, config: MoRConfig) -> None:
        super().__init__()
        self.bins, self.is_causal = config.num_mel_bins or 0, config.is_causal
        self.step, self.strides = config.frames_per_token, config.conv_stride
        width, before = config.hidden_size, self.bins
        self.convolutions = nn.ModuleList()
        for kernel, stride in zip(config.conv_kernel, config.conv_stride, strict=True):
            self.convolutions.append(nn.Conv1d(before, width, kernel, stride))
            before = width

    def check(self, frames: Tensor) -> Tensor:
        """``frames`` as [B, T, bins]; Whisper's [B, bins, T] is turned.

        Raises:
            ValueError: another shape.
        """
        shape = tuple(frames.shape)
        if frames.dim() == 3 and shape[2] != self.bins and shape[1] == self.bins:
            return frames.transpose(1, 2)
        if frames.dim() != 3 or shape[2] != self.bins or not shape[1]:
            raise ValueError(
                f"input_features has shape {shape}; this model takes [B, frames, {self.bins}], "
                "at least one frame of num_mel_bins numbers"
            )
        return frames

    def forward(self, frames: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Frames [B, T, bins], each row's real ones first, -> stream [B, T', D].

        Args:
            frames: as they come.
            lengths: [B] real frames of each row; None where all are.
        """
        hidden = frames.to(next(self.parameters()).dtype).transpose(1, 2)
        for number, layer in enumerate(self.convolutions):
            assert isinstance(layer, nn.Conv1d)
            if number:
                hidden = F.gelu(hidden)
            if lengths is not None:
                places = torch.arange(hidden.shape[2], device=hidden.device)
                hidden = hidden.masked_fill((places >= lengths[:, None])[:, None], 0.0)
                lengths = -(-lengths // layer.stride[0])
            reach = layer.kernel_size[0] - 1
            before = reach if self.is_causal else reach // 2
            # With a stride the last window may need fewer than there are; more does no harm.
            hidden = layer(F.pad(hidden, (before, reach - before)))
        return hidden.transpose(1, 2)


def build_front(config: MoRConfig) -> nn.Module:
    """The front end that ``config.modality`` names."""
    if config.modality == "image":
        return PatchEmbedding(config)
    if config.modality == "audio":
        return FrameEmbedding(config)
    return nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)


def read_inputs(
    front: nn.Module,
    input_ids: Tensor | None,
    inputs_embeds: Tensor | None,
    features: Tensor | None,
    mask: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """The stream [B, T, D] of what a forward was given, and the mask of its tokens.

    Sounds come out with their real tokens at the front of each row, wherever padding stood.

    Args:
        front: of the model.
        input_ids: [B, T], or
        inputs_embeds: [B, T, D], or
        features: pixels [B, C, H, W] or frames [B, T', bins]; one of the three.
        mask: [B, T] of tokens, for sounds [B, T'] of frames.

    Raises:
        ValueError: not one of the three, one that is not for this front end, or a wrong shape.
    """
    if sum(given is not None for given in (input_ids, inputs_embeds, features)) != 1:
        raise ValueError(
            "give input_ids or inputs_embeds, one of the two"
            if features is None
            else "give pixel_values or input_features, and no tokens beside"
        )
    if inputs_embeds is not None:
        return inputs_embeds, mask
    if input_ids is not None:
        if modality_of(front) != "text":
            raise ValueError(
                "input_ids are for models of text; this one takes "
                f"{'pixel_values' if modality_of(front) == 'image' else 'input_features'}"
            )
        if input_ids.dim() != 2:
            raise ValueError(f"input_ids has shape {tuple(input_ids.shape)}; it must be [B, T]")
        return front(input_ids), mask
    assert features is not None
    if modality_of(front) == "image":
        if mask is not None:
            raise ValueError("attention_mask is for tokens and frames; all patches are real")
        return front(features), None
    if modality_of(front) != "audio":
        raise ValueError("this model reads text; give input_ids")
    sounds: Any = front
    frames, lengths = align_frames(sounds.check(features), mask)
    hidden = sounds(frames, lengths)
    if lengths is None:
        return hidden, None
    for stride in sounds.strides:
        lengths = -(-lengths // stride)
    return hidden, torch.arange(hidden.shape[1], device=hidden.device) < lengths[:, None]


def modality_of(front: nn.Module) -> str:
    """What a front end reads: ``text``, ``image`` or ``audio``.

    Asked by name and not by class: an adapter puts a module of its own around it, which passes
    names on.
    """
    found: str = getattr(front, "modality", "text")
    return found


def align_frames(frames: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Each row's real frames moved to its front, and how many they are; None for all.

    Args:
        frames: [B, T, bins].
        mask: [B, T], 1 for real frames.

    Raises:
        ValueError: a mask of another shape, or a row without a real frame.
    """
    if mask is None:
        return frames, None
    if mask.shape != frames.shape[:2]:
        raise ValueError(
            f"attention_mask has shape {tuple(mask.shape)}; it must be {list(frames.shape[:2])}, "
            "1 for real frames"
        )
    real = mask.bool()
    lengths = real.sum(1)
    if not bool(lengths.all()):
        row = int((lengths == 0).nonzero()[0, 0])
        raise ValueError(f"attention_mask leaves row {row} without a single frame")
    if bool(real.all()):
        return frames, None
    order = (~real).to(torch.uint8).argsort(dim=1, stable=True)[:, : int(lengths.max())]
    return frames.gather(1, order[..., None].expand(-1, -1, frames.shape[2])), lengths
