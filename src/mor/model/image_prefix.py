"""Images and sounds as tokens of a language model, mapped into the space of its embeddings."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from mor.config import MoRConfig
from mor.model.front import FrameEmbedding, PatchEmbedding, align_frames
from mor.model.layers import RMSNorm


class _Prefix(nn.Module):
    """A feed-forward layer of two maps beside what a front end gives.

    What LLaVA's projector is to its vision tower (arXiv 2310.03744): here the recursions themselves
    are what looks at the patches, or listens to the frames.
    """

    def __init__(self, name: str, front: nn.Module, config: MoRConfig) -> None:
        super().__init__()
        self.add_module(name, front)
        width = config.hidden_size
        self.norm = RMSNorm(width, config.rms_norm_eps)
        self.linear_1 = nn.Linear(width, 2 * width)
        self.linear_2 = nn.Linear(2 * width, width)

    def map(self, hidden: Tensor) -> Tensor:
        """[N, T, D] -> [N, T, D]."""
        added: Tensor = self.linear_2(F.gelu(self.linear_1(self.norm(hidden))))
        return hidden + added


class ImagePrefix(_Prefix):
    """Patches by a linear map with 2-D positions, and the feed-forward layer.

    Args:
        config: ``image_size``, ``patch_size``, ``num_channels``, ``hidden_size``, ``stem_channels``
            and ``stem_strides`` count.
    """

    patches: PatchEmbedding

    def __init__(self, config: MoRConfig) -> None:
        super().__init__("patches", PatchEmbedding(config), config)

    def forward(self, pixels: Tensor) -> Tensor:
        """Pixels [N, C, H, W] -> embeddings [N, P, D], row by row.

        Raises:
            ValueError: images of another shape.
        """
        return self.map(self.patches(pixels))


class AudioPrefix(_Prefix):
    """Frames by strided convolutions, and the feed-forward layer.

    Args:
        config: ``num_mel_bins``, ``conv_kernel``, ``conv_stride`` and ``hidden_size`` count.
    """

    frames: FrameEmbedding

    def __init__(self, config: MoRConfig) -> None:
        super().__init__("frames", FrameEmbedding(config), config)

    def forward(self, frames: Tensor, mask: Tensor | None = None) -> tuple[Tensor, list[int]]:
        """Frames [N, T, bins] -> embeddings [N, T', D], and how many of each sound are real.

        Args:
            frames: of sounds; Whisper's [N, bins, T] is turned.
            mask: [N, T] 1 for real frames, wherever padding stands; None where all are.

        Raises:
            ValueError: frames of another shape, or a sound that is all padding.
        """
        taken, lengths = align_frames(self.frames.check(frames), mask)
        hidden = self.map(self.frames(taken, lengths))
        if lengths is None:
            return hidden, [hidden.shape[1]] * len(hidden)
        for stride in self.frames.strides:
            lengths = -(-lengths // stride)
        return hidden, [int(length) for length in lengths]
