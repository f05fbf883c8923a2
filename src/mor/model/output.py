"""What a forward pass gives."""

from __future__ import annotations

from dataclasses import dataclass, field

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
    """

    hidden: Tensor
    depths: Tensor
    losses: dict[str, Tensor] = field(default_factory=dict)
    states: list[Tensor] = field(default_factory=list)
    traces: list[DepthTrace] = field(default_factory=list)
    exits: dict[int, Tensor] = field(default_factory=dict)
