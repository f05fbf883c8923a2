"""The network once more, as plainly as it can be written: the reference of the property tests.

One row at a time, no compaction, no cache, no batch: at every depth all tokens of a row run, each
query sees the keys it may see through an explicit mask, and only the active tokens keep what came
out. It shares the weights of a model and none of its code.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.reference_routing import ROUTING
from tests.reference_rows import Row, norm


@dataclass
class Reference:
    """Logits [T, V] and depths [T] of each row, router losses of the batch by name."""

    logits: list[Tensor]
    depths: list[Tensor]
    losses: dict[str, Tensor] = field(default_factory=dict)


def reference(
    model: Any,
    rows: list[Tensor],
    *,
    causal: bool,
    max_depth: int | None = None,
) -> Reference:
    """What the model has to say about rows of ids [T] or of embedded tokens [T, D], in evaluation.

    Logits are [T, V], or [classes] of a head over classes.
    """
    config = model.config
    table = model.model.embed_tokens
    states = [
        Row(
            model,
            row if row.is_floating_point() else F.embedding(row, table.weight, table.padding_idx),
        )
        for row in rows
    ]
    for row in states:
        row.stack(model.model.prelude_layers)
        row.open()
    limit = min(max_depth or config.num_recursions, config.router_fixed_depth or 9)
    routing = ROUTING[config.router](model, states, causal, limit)
    for depth in range(limit):
        for row, active in zip(states, routing.active(depth), strict=True):
            output = row.block(depth, active)
            row.hidden = torch.where(
                active[:, None], routing.update(row, output, depth), row.hidden
            )
            row.alive, row.depths = active, row.depths + active
    logits = []
    for row in states:
        row.hidden = row.seen(row.hidden)
        row.stack(model.model.coda_layers)
        normed, head = norm(model.model.norm, row.hidden), model.model.lm_head
        normed = normed.mean(0) if config.head_type == "classes" else normed
        logits.append(normed @ head.weight.T + (0 if head.bias is None else head.bias))
    return Reference(logits, [row.depths for row in states], routing.losses)
