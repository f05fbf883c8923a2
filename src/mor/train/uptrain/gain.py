"""A router that learns from what depth brings, on a trunk that stays as it is.

The trunk runs every token with a label at every depth. Its **gain** after pass r is what the best
deeper exit saves of its loss: max(0, loss at r - lowest loss deeper). The router's logit before
pass r + 1 is taught sigmoid(sharpness (gain - margin)) by binary cross-entropy. So a gate never
closes because later passes are not worth anything *yet*, and depth goes where it was seen to help
(Ouro's second stage, arXiv 2510.25741, with the best deeper exit in place of the next one).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mor.errors import MorError
from mor.model.loss import next_token_targets
from mor.model.model import MoRModel
from mor.model.network import find_network, find_router
from mor.model.routers.base import Router
from mor.model.routers.boundary import BoundaryRouter
from mor.model.routers.forced import forced_depths
from mor.ops.cross_entropy import IGNORE
from mor.ops.ranks import world_size
from mor.train.objective import LossParts
from mor.train.recipe.recipe import Recipe
from mor.train.recipe.uptrain import GainSection


def check_gain(recipe: Recipe, section: GainSection) -> None:
    """Refuse ways of training under which gains would be wrong, or not what the recipe says.

    Raises:
        MorError: several processes, a depth schedule, bfloat16, or padding and documents where
            single tokens are sent to a depth.
    """
    train, data = recipe.train, recipe.data
    if world_size() > 1:
        raise MorError(
            f"uptrain.gain runs in one process, not {world_size()}: DDP would not see the router's "
            "gradients; the stage is short, start it without torchrun"
        )
    if train.depth_schedule is not None:
        raise MorError(
            f"train.depth_schedule={train.depth_schedule!r} does not go with uptrain.gain, "
            "which runs every token at full depth; leave depth_schedule out"
        )
    if train.dtype != "float32":
        raise MorError(f"train.dtype={train.dtype!r} does not go with uptrain.gain; use float32")
    if section.context == "routed" and (data.packing != "concat" or data.document_mask):
        raise MorError(
            "uptrain.gain.context='routed' sends single tokens of whole rows to a depth; it needs "
            "data.packing='concat' and no document_mask, or context='full'"
        )


def prepare_router(model: Any, section: GainSection) -> None:
    """Set the boundaries of a router that is to learn gains.

    Raises:
        MorError: the router compares no logit with a boundary, or tokens may skip every pass.
    """
    router, config = find_router(model), model.config
    if not isinstance(router, BoundaryRouter) or router.auxiliary is not None:
        raise MorError(
            f"uptrain.gain teaches a router with one logit per depth; model.router="
            f"{config.router!r} has none of its own: use threshold"
        )
    if config.router_capacities[0] < 1:
        raise MorError(
            f"uptrain.gain knows no loss before the first pass: router_capacities="
            f"{config.router_capacities} must begin with 1.0"
        )
    router.set_confidence(section.confidence)


@dataclass
class DepthGain:
    """Binary cross-entropy of the router's logits against the gains of its own trunk.

    Attributes:
        section: margin, sharpness, and what to teach tokens without a label.
    """

    section: GainSection

    def __call__(
        self, model: nn.Module, batch: dict[str, Any], items: Tensor, traces: bool = False
    ) -> LossParts:
        """See :class:`~mor.train.objective.Objective`; the NLL of every exit goes to the log."""
        batch = dict(batch)
        targets = next_token_targets(batch.pop("labels"))
        network, router = find_network(model), find_router(model)
        losses, states, own = measure_exits(network, batch, targets, self.section.context)
        told = targets != IGNORE
        items = items.clamp(min=1)
        shares = {
            f"gain/nll_at_{depth}": exit_loss.sum() / items
            for depth, exit_loss in enumerate(losses, 1)
        }
        total = losses.new_zeros(())
        for depth in range(1, len(losses)):
            goal = find_gain_targets(losses, depth, self.section) * told
            logits = score_states(router, states[depth], depth)
            error = F.binary_cross_entropy_with_logits(logits, goal, reduction="none")
            asked = told | (own >= depth) if self.section.elsewhere == "shallow" else told
            error = error * asked  # who has left is asked nothing
            total = total + error.sum() / items
            shares[f"gain/target_{depth}"] = goal.sum() / items
        shares["lm_loss"] = losses[-1].sum() / items
        depths = torch.full_like(batch["input_ids"], len(losses))
        return LossParts(total, shares, depths=depths)


@torch.no_grad()
def measure_exits(
    network: MoRModel, batch: dict[str, Any], targets: Tensor, context: str = "full"
) -> tuple[Tensor, list[Tensor], Tensor]:
    """The loss of every exit, and the stream between the passes.

    Args:
        network: any.
        batch: ``input_ids`` [B, T] and what the network takes beside.
        targets: [B T], -100 where there is none.
        context: the depth of tokens without a target: that of the others (``full``), or where the
            router sends them (``routed``).

    Returns:
        Losses [R, B T] of leaving after pass 1..R, 0 without a target; the streams [B T, D] before
        the first pass and after each; and the passes [B T] that each token ran at full depth.
    """
    if "position_ids" in batch:
        batch["positions"] = batch.pop("position_ids")
    recursions, first = network.config.num_recursions, network.config.num_prelude_layers
    told = targets != IGNORE
    losses = torch.zeros(recursions, len(targets), device=targets.device)
    routes = None if context == "full" else network(**batch, routing="causal").depths
    for depth in range(1, recursions + 1):
        deepest = depth == recursions
        if routes is None:
            output = network(**batch, routing="full", max_depth=depth, keep_states=deepest)
        else:
            here = torch.where(told.view_as(routes), depth, routes)
            with forced_depths(network, here):
                output = network(**batch, routing="causal", keep_states=deepest)
        losses[depth - 1] = measure_exit(network, output.hidden, targets)
    states = output.states[first : first + recursions + 1]
    return losses, [state.flatten(0, 1) for state in states], output.depths.flatten()


def measure_exit(network: MoRModel, hidden: Tensor, targets: Tensor) -> Tensor:
    """The loss [B T] of leaving with ``hidden`` [B, T, D]; 0 without a target."""
    told = targets != IGNORE
    losses = torch.zeros(len(targets), device=targets.device)
    logits = network.head(hidden.flatten(0, 1)[told]).float()
    own = F.cross_entropy(logits, targets[told], reduction="none")
    return losses.masked_scatter(told, own)


def find_gain_targets(losses: Tensor, depth: int, section: GainSection) -> Tensor:
    """What a token that has run ``depth`` passes is taught about the next one, [B T] in 0..1."""
    gain = (losses[depth - 1] - losses[depth:].amin(0)).clamp(min=0)
    return torch.sigmoid(section.sharpness * (gain - section.margin))


def score_states(router: Router, states: Tensor, depth: int) -> Tensor:
    """The router's logits before recursion ``depth`` (0-based) of streams [N, D]; [N]."""
    positions = torch.zeros(len(states), dtype=torch.long, device=states.device)
    logits = router.score(states, depth, positions, None).logits
    assert logits is not None
    return logits
