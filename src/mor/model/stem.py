"""A convolutional stem: what may stand before the linear map of patches.

Early convolutions help transformers see better (arXiv 2106.14881): overlapping windows of 3 x 3
find edges that a cut into patches breaks. The number of tokens and their width stay.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from mor.config import MoRConfig

KERNEL = 3


class StemLayer(nn.Module):
    """A convolution of 3 x 3, batch norm, GELU.

    Batch norm, as published: with a norm of each image by itself a network of silhouettes learned
    much slower. In training an image's stream hangs on its batch; in evaluation it does not.

    Args:
        before, after: channels.
        stride: 1 to 3; a map of S x S becomes one of S / stride.
    """

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(before, after, KERNEL, stride, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(after)

    def forward(self, pixels: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C', H / stride, W / stride]."""
        found: Tensor = F.gelu(self.norm(self.convolution(pixels)))
        return found


def build_stem(config: MoRConfig) -> nn.Sequential:
    """The convolutions that ``stem_channels`` and ``stem_strides`` ask for; none where None.

    They take [B, C, H, W] to [B, stem_channels[-1], rows, columns] of patches.
    """
    layers: list[nn.Module] = []
    before = config.num_channels
    for after, stride in config.stem_layers:
        layers.append(StemLayer(before, after, stride))
        before = after
    return nn.Sequential(*layers)


def stem_flops(config: MoRConfig) -> float:
    """FLOPs of the convolutions per patch; norms and GELU are not counted, as elsewhere."""
    total, before = 0.0, config.num_channels
    tall, wide = config.patch_shape
    for after, stride in config.stem_layers:
        tall, wide = tall // stride, wide // stride
        total += 2.0 * tall * wide * KERNEL**2 * before * after
        before = after
    return total
