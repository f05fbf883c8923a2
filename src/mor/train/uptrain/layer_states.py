"""The residual stream after every unrolled layer, of teacher and student, token by token.

The stream is taken from the layers by hooks, so that the network knows nothing of distillation. A
shared layer is asked once per depth; where tokens are routed, it answers for those that run that
depth, and the routing's trace says which they are.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mor.config import MoRConfig
from mor.model.layers import DecoderLayer
from mor.model.model import MoRModel
from mor.model.recorder import DepthTrace

_BEND = 0.1
"""Where the error turns from square to linear."""


@contextmanager
def record_layer_states(model: MoRModel, wanted: set[int]) -> Iterator[dict[int, Tensor]]:
    """Collect [tokens, D] after unrolled layers during one forward pass, by their number.

    What a depth without any token would have given is missing.

    Args:
        model: whose layers.
        wanted: numbers of unrolled layers, from 0.
    """
    config, found = model.config, {}
    first_coda = config.num_hidden_layers - config.num_coda_layers
    starts = [
        (model.prelude_layers, 0),
        (model.block, config.num_prelude_layers),
        (model.coda_layers, first_coda),
    ]

    def hook(start: int) -> Any:
        def keep(layer: DecoderLayer, inputs: tuple[Any, ...], output: Tensor) -> None:
            number = start + inputs[3]  # its place within the stage
            if number in wanted:
                found[number] = output.flatten(0, -2)

        return keep

    handles = [
        layer.register_forward_hook(hook(start)) for stage, start in starts for layer in stage
    ]
    try:
        yield found
    finally:
        for handle in handles:  # checkpointing runs layers once more, in the backward pass
            handle.remove()


def numbers_at(config: MoRConfig, where: str) -> list[int]:
    """Unrolled layers to compare at: all, or the private ones and the last of every depth."""
    block, first = config.num_recursion_layers, config.num_prelude_layers
    last = first + config.num_recursions * block
    return [
        number
        for number in range(config.num_hidden_layers)
        if where == "layers" or not first <= number < last or (number - first + 1) % block == 0
    ]


def find_runners(traces: Sequence[DepthTrace]) -> list[Tensor]:
    """For each depth that was reached, the numbers of its tokens, in the order they were run."""
    runners = []
    for trace in traces:
        active = trace.active.flatten()
        if trace.candidates is None:
            runners.append(active.nonzero().flatten())
        else:
            runners.append(trace.candidates.flat.flatten()[active])
    return runners


def stream_error(
    config: MoRConfig,
    student: dict[int, Tensor],
    teacher: dict[int, Tensor],
    runners: Sequence[Tensor] | None,
) -> Tensor:
    """Smooth L1 of the streams, in units of the teacher's root mean square at each token.

    Mean over channels and tokens of a layer, then over layers. Relative per token and linear beyond
    a tenth, so that neither the few tokens nor the few channels whose stream is a hundred times
    larger count for all.

    Args:
        config: of the student.
        student: [its tokens, D] by number of the layer.
        teacher: [all tokens, D] by the student's number of the layer.
        runners: from :func:`find_runners`; None where every token runs every layer.
    """
    first = config.num_prelude_layers
    shared = range(first, first + config.num_recursions * config.num_recursion_layers)
    terms = []
    for number, ours in student.items():
        theirs = teacher[number].to(device=ours.device)
        if runners is not None and number in shared:
            theirs = theirs[runners[(number - first) // config.num_recursion_layers]]
        ours, theirs = ours.float(), theirs.float()
        scale = theirs.square().mean(-1, keepdim=True).clamp(min=1e-12).rsqrt()
        terms.append(F.smooth_l1_loss(ours * scale, theirs * scale, beta=_BEND))
    return torch.stack(terms).mean()
