"""Trunk and router from the first step on: a token goes deeper while it is still wrong here.

A router that is taught by what deeper passes bring learns nothing before they bring anything, and
a pass that no token is sent to never will. So the router's logit before pass r + 1 is taught
whether the token's loss, were it to leave after pass r, is above a margin:
sigmoid(sharpness (loss - margin)), by binary cross-entropy. Tokens without a label are taught to
leave at once. With ``linger`` a token that is right stays for as many passes more: keys and values
of a pass are made of what goes into it, so what a token found in its last pass no other token can
see. The trunk learns under these routes (the router's rule for decoding), so what one
pass can answer is learnt at the exit after one pass, and deeper passes see what is left.
``every_exit`` trains the exits that a token passes by, too.

The next-token loss has no say in the routes: its gradient ends before the router.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mor.config import MoRConfig
from mor.errors import MorError
from mor.model.loss import next_token_targets
from mor.model.network import find_network, find_router
from mor.model.output import ModelOutput
from mor.model.routers.base import Router
from mor.ops.cross_entropy import IGNORE
from mor.ops.ranks import world_size
from mor.train.objective import LossParts
from mor.train.recipe.depth import RouteByLossSection
from mor.train.recipe.recipe import Recipe
from mor.train.uptrain.gain import measure_exit, score_states


def check_route_by_loss(recipe: Recipe, config: MoRConfig) -> None:
    """Refuse what such routes do not go with.

    Args:
        recipe: with ``train.route_by_loss``.
        config: of the model.

    Raises:
        MorError: another router or update rule, another objective, several processes, bfloat16,
            images or sounds.
    """
    name, train = "train.route_by_loss", recipe.train
    if config.router != "threshold":
        raise MorError(
            f"{name} teaches a router with one logit per depth and no other loss; model.router="
            f"{config.router!r} is none: use threshold"
        )
    if config.update_rule != "last":
        raise MorError(
            f"{name} needs update_rule='last', where a score scales nothing; model.update_rule="
            f"{config.update_rule!r}"
        )
    if config.router_capacities[0] < 1:
        raise MorError(
            f"{name} knows no loss before the first pass: router_capacities="
            f"{config.router_capacities} must begin with 1.0"
        )
    if config.modality != "text":
        raise MorError(f"{name} is for texts; model.modality={config.modality!r}")
    if recipe.uptrain is not None and (recipe.uptrain.gain or recipe.uptrain.distill):
        raise MorError(f"{name} is an objective of its own; leave uptrain.gain and distill out")
    for field, right in {"routing": None, "depth_schedule": None, "dtype": "float32"}.items():
        if getattr(train, field) != right:
            raise MorError(
                f"train.{field}={getattr(train, field)!r} does not go with {name}; use {right}"
            )
    if world_size() > 1:
        raise MorError(
            f"{name} runs in one process, not {world_size()}: DDP would not see the gradients"
        )


@dataclass
class RouteByLoss:
    """Next-token loss under the router's own routes, and what the router is taught.

    Whoever begins a run sets the boundaries, to the section's confidence.

    Attributes:
        section: margin, sharpness, how long right tokens stay, and the weight of exits passed by.
    """

    section: RouteByLossSection

    def __call__(
        self, model: nn.Module, batch: dict[str, Any], items: Tensor, traces: bool = False
    ) -> LossParts:
        """See :class:`~mor.train.objective.Objective`; the log has the share that has to go on."""
        batch = dict(batch)
        targets = next_token_targets(batch.pop("labels"))
        if "position_ids" in batch:
            batch["positions"] = batch.pop("position_ids")
        network, router = find_network(model), find_router(model)
        recursions = network.config.num_recursions
        with untaught(router):
            output: ModelOutput = network(
                **batch, routing="causal", keep_states=True, keep_traces=traces,
                exits=range(1, recursions),
            )  # fmt: skip
        items = items.clamp(min=1)
        lm = network.head_loss(output.hidden, targets) / items
        shares, total = {"lm_loss": lm}, lm
        depths, told = output.depths.flatten(), targets != IGNORE
        first = network.config.num_prelude_layers
        weight = self.section.every_exit
        # Nothing is known before the first exit: there a token counts as wrong.
        wrong = [torch.ones(len(targets), device=targets.device)] * self.section.linger
        for depth in range(1, recursions):
            with torch.set_grad_enabled(weight > 0):
                loss = measure_exit(network, output.exits[depth], targets)
            total = total + weight * (loss * (depths > depth)).sum() / items
            wrong.append(
                torch.sigmoid(self.section.sharpness * (loss.detach() - self.section.margin))
            )
            goal = torch.stack(wrong[-1 - self.section.linger :]).amax(0) * told
            states = output.states[first + depth].flatten(0, 1).detach()
            error = F.binary_cross_entropy_with_logits(
                score_states(router, states, depth), goal, reduction="none"
            )
            here = depths >= depth
            total = total + (error * here).sum() / items
            shares[f"routes/wrong_at_{depth}"] = (goal * here).sum() / items
        mask = batch.get("attention_mask")
        traced = tuple(output.traces)
        return LossParts(total, shares, depths=output.depths, traces=traced, token_mask=mask)


@contextmanager
def untaught(router: Router) -> Iterator[None]:
    """In between, nothing that runs through ``router`` teaches it."""
    taught = [parameter for parameter in router.parameters() if parameter.requires_grad]
    for parameter in taught:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in taught:
            parameter.requires_grad_(True)
