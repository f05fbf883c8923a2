"""A router that learns which examples depth helps, on a trunk that stays as it is.

As :mod:`mor.train.uptrain.gain`, for heads that answer once per example: the gain of a pass is what
the best deeper exit saves of the example's loss, and every token of the example is taught it. So a
picture that is told at once leaves at once; within a hard one the tokens may still differ, since
each logit reads its own token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mor.model.model import MoRModel
from mor.model.network import find_network, find_router
from mor.train.objective import LossParts
from mor.train.recipe.uptrain import GainSection
from mor.train.uptrain.gain import find_gain_targets, score_states


@dataclass
class ExampleGain:
    """Binary cross-entropy of the router's logits against the gains of whole examples.

    Attributes:
        section: margin and sharpness, and whether gains are measured among routed tokens.
    """

    section: GainSection

    def __call__(
        self, model: nn.Module, batch: dict[str, Any], items: Tensor, traces: bool = False
    ) -> LossParts:
        """See :class:`~mor.train.objective.Objective`; the NLL of every exit goes to the log."""
        network, router = find_network(model), find_router(model)
        losses, states, depths, real = measure_exits(network, dict(batch), self.section.context)
        items = items.clamp(min=1)
        # Every example weighs the same, however many tokens it has.
        weights = torch.ones_like(depths, dtype=losses.dtype) if real is None else real.float()
        weights = weights / weights.sum(1, keepdim=True)
        shares = {
            f"gain/nll_at_{depth}": exit_loss.sum() / items
            for depth, exit_loss in enumerate(losses, 1)
        }
        total = losses.new_zeros(())
        for depth in range(1, len(losses)):
            goal = find_gain_targets(losses, depth, self.section)
            logits = score_states(router, states[depth].flatten(0, 1), depth)
            wanted = goal[:, None].expand_as(depths).flatten()
            error = F.binary_cross_entropy_with_logits(logits, wanted, reduction="none")
            total = total + (error.view_as(weights) * weights).sum() / items
            shares[f"gain/target_{depth}"] = goal.sum() / items
        shares["label_loss"] = losses[-1].sum() / items
        return LossParts(total, shares, depths=depths, token_mask=real)


@torch.no_grad()
def measure_exits(
    network: MoRModel, batch: dict[str, Any], context: str = "full"
) -> tuple[Tensor, list[Tensor], Tensor, Tensor | None]:
    """The loss of every exit, and the stream between the passes.

    Args:
        network: with a head over classes.
        batch: ``pixel_values`` or ``input_features``, ``labels`` [B], maybe ``attention_mask``.
        context: every token runs every pass (``full``), or goes where the router sends it until
            the exit (``routed``).

    Returns:
        Losses [R, B] of leaving after pass 1..R; the streams [B, T, D] before the first pass and
        after each; the passes [B, T] of the last run; and which tokens are real.
    """
    labels = batch.pop("labels")
    inputs = {
        "features": batch.get("pixel_values", batch.get("input_features")),
        "attention_mask": batch.get("attention_mask"),
        "routing": "full" if context == "full" else "causal",
    }
    recursions, first = network.config.num_recursions, network.config.num_prelude_layers
    losses = []
    for depth in range(1, recursions + 1):
        output = network(**inputs, max_depth=depth, keep_states=depth == recursions)
        logits = network.head(output.hidden, output.real).float()
        losses.append(F.cross_entropy(logits, labels, reduction="none"))
    states = output.states[first : first + recursions + 1]
    return torch.stack(losses), states, output.depths, output.real
