"""Images as tokens of a language model: patches, mapped into the space of its embeddings."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from mor.config import MoRConfig
from mor.model.front import PatchEmbedding
from mor.model.layers import RMSNorm


class ImagePrefix(nn.Module):
    """Patches by a linear map with 2-D positions, and a feed-forward layer of two maps beside them.

    What LLaVA's projector is to its vision tower (arXiv 2310.03744): here the recursions themselves
    are what looks at the patches.

    Args:
        config: ``image_size``, ``patch_size``, ``num_channels`` and ``hidden_size`` count.
    """

    def __init__(self, config: MoRConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.patches = PatchEmbedding(config)
        self.norm = RMSNorm(width, config.rms_norm_eps)
        self.linear_1 = nn.Linear(width, 2 * width)
        self.linear_2 = nn.Linear(2 * width, width)

    def forward(self, pixels: Tensor) -> Tensor:
        """Pixels [N, C, H, W] -> embeddings [N, P, D], row by row.

        Raises:
            ValueError: images of another shape.
        """
        hidden = self.patches(pixels)
        return hidden + self.linear_2(F.gelu(self.linear_1(self.norm(hidden))))
