"""What a shared layer may do differently at each of its uses (arXiv 2410.20672).

Weights of the block stay shared. Beside them stands a little per use: a product of two thin
matrices for every linear map (``lora``), a gain per channel on what attention and feed-forward add
(``gains``), or a vector per depth added to the stream (``embeddings``). All start without effect.

``use`` is one number for all tokens, or one per token [A, M], so that tokens of different depths
can share a batch.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mor.config import MoRConfig
from mor.ops.planned import one_hot

LINEAR_MAPS = {
    "self_attn": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "mlp": ("gate_proj", "up_proj", "down_proj"),
}
"""The linear maps of a layer, by the half they stand in."""


def short(name: str) -> str:
    """``q`` for ``q_proj``: adapters that look for modules called ``q_proj`` find the map alone."""
    return name.removesuffix("_proj")


def effective_rank(config: MoRConfig, inputs: int, outputs: int) -> int:
    """Rank that ``relaxation_rank`` comes to for a map of this size: never more than it has."""
    return min(config.relaxation_rank, inputs, outputs)


class Relaxation(nn.Module):
    """Base of what differs by use. ``reset`` puts it where it has no effect."""

    def reset(self, std: float) -> None:
        """Start without effect; ``std`` is for the part that may be random."""
        raise NotImplementedError


class LowRank(Relaxation):
    """``scale x up[use] (down[use] x)``, and a bias per use where the map has one.

    Args:
        linear: the shared map that this stands beside.
        uses: how often the map is used.
        config: for rank and alpha; the scale is ``relaxation_alpha / relaxation_rank``, or 1.
    """

    def __init__(self, linear: nn.Linear, uses: int, config: MoRConfig) -> None:
        super().__init__()
        inputs, outputs = linear.in_features, linear.out_features
        rank = effective_rank(config, inputs, outputs)
        self.scale = 1.0
        if config.relaxation_alpha is not None:
            self.scale = config.relaxation_alpha / config.relaxation_rank
        self.down = nn.Parameter(torch.empty(uses, rank, inputs))
        self.up = nn.Parameter(torch.empty(uses, outputs, rank))
        self.bias = None if linear.bias is None else nn.Parameter(torch.empty(uses, outputs))
        self.reset(0.02)

    def reset(self, std: float) -> None:
        """The first matrix random, the second zero."""
        nn.init.normal_(self.down, 0.0, std)
        nn.init.zeros_(self.up)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, hidden: Tensor, use: int | Tensor) -> Tensor:
        """[A, M, inputs] -> [A, M, outputs], to be added to the shared map's output."""
        if isinstance(use, Tensor):
            # All uses side by side and each token's own let through: two plain products, whatever
            # the mixture, at (uses - 1) times more of the thin work.
            uses, rank, _ = self.down.shape
            own = one_hot(use, uses, hidden.dtype)[..., None]
            thin = F.linear(hidden, self.down.flatten(0, 1)).unflatten(-1, (uses, rank)) * own
            out = F.linear(thin.flatten(-2), self.up.transpose(0, 1).flatten(1))
        else:
            out = F.linear(F.linear(hidden, self.down[use]), self.up[use])
        return self.finish(out, use)

    def finish(self, out: Tensor, use: int | Tensor) -> Tensor:
        """Scale and bias of what the two matrices gave, [A, M, outputs]."""
        if self.scale != 1.0:
            out = out * self.scale
        return out if self.bias is None else out + self.bias[use]


class Gain(Relaxation):
    """A factor per use and channel."""

    def __init__(self, width: int, uses: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(uses, width))

    def reset(self, std: float) -> None:
        """Ones."""
        nn.init.ones_(self.weight)

    def forward(self, hidden: Tensor, use: int | Tensor) -> Tensor:
        """[A, M, D] -> [A, M, D]."""
        return hidden * self.weight[use]


class DepthEmbedding(Relaxation):
    """A vector per depth, added to the stream that enters it."""

    def __init__(self, width: int, depths: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(depths, width))

    def reset(self, std: float) -> None:
        """Zeros."""
        nn.init.zeros_(self.weight)

    def forward(self, hidden: Tensor, depth: int | Tensor) -> Tensor:
        """[A, M, D] -> [A, M, D]."""
        return hidden + self.weight[depth]


class Relaxable(nn.Module):
    """A half of a layer, whose linear maps may carry a :class:`LowRank` each."""

    low_rank: nn.ModuleDict | None

    def relax(self, config: MoRConfig, uses: int | None, names: tuple[str, ...]) -> None:
        """Put a :class:`LowRank` beside the maps ``names`` if the configuration asks for it."""
        self.low_rank = None
        if uses is not None and config.relaxation == "lora":
            self.low_rank = nn.ModuleDict(
                {short(name): LowRank(getattr(self, name), uses, config) for name in names}
            )

    def map(self, name: str, hidden: Tensor, use: int | Tensor) -> Tensor:
        """Linear map ``name`` of ``hidden`` at this use."""
        out = getattr(self, name)(hidden)
        return out if self.low_rank is None else out + self.low_rank[short(name)](hidden, use)
