"""What a forward pass gives."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from mor.model.recorder import DepthTrace


@dataclass
class ModelOutput:
    """Result of one forward pass over ids [B, T].

    Attributes:
        hidden: [B, T, D] after the coda, before the final norm; zero at padding.
        depths: [B, T] recursions that each token ran; 0 at padding.
        losses: router loss terms by name, not weighted.
        states: stream at the stages' seams, where asked for: after embed, each prelude layer,
            each recursion up to the depth cap, each coda layer; zero at padding.
        traces: routing per depth, where asked for. Laid end to end ([1, N]) if the batch had
            padding or documents, front-packed rows if there was a cache too.
        exits: by number of recursions, where asked for: [B, T, D] after the coda, had every token
            stopped after at most so many. The last one is ``hidden`` itself.
        real: [B, T'] mask of the tokens as the stages took it, made anew for frames; None for all.
    """

    hidden: Tensor
    depths: Tensor
    losses: dict[str, Tensor] = field(default_factory=dict)
    states: list[Tensor] = field(default_factory=list)
    traces: list[DepthTrace] = field(default_factory=list)
    exits: dict[int, Tensor] = field(default_factory=dict)
    real: Tensor | None = None

    @classmethod
    def nothing(cls, hidden: Tensor) -> ModelOutput:
        """Of a batch [B, T, D] that is padding and nothing else."""
        zeros = torch.zeros(hidden.shape[:2], dtype=torch.long, device=hidden.device)
        return cls(torch.zeros_like(hidden), zeros)
