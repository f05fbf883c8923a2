"""AdamW: its groups of parameters, the trapezoid of its rate, and clipping."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW

from mor.model.network import find_router
from mor.train.recipe.sections import TrainSection
from mor.train.uptrain.groups import rate_factors, split_groups

# Weight decay is for matrices; these names belong to norms and biases.
_NOT_DECAYED = re.compile(r"bias|layernorm|rmsnorm|(?:^|\.)norm(?:$|\.)|_norm(?:$|\.)")


def trapezoid(section: TrainSection, steps: int) -> tuple[int, int]:
    """Steps of warm-up and of decay of a run of ``steps``; they never overlap."""
    warmup = round(section.warmup_fraction * steps)
    if section.warmup_steps is not None:
        warmup = min(section.warmup_steps, steps)
    return warmup, min(round(section.decay_fraction * steps), steps - warmup)


def rate_factor(step: int, steps: int, warmup: int, decay: int) -> float:
    """What the learning rate of optimiser step ``step`` (0-based) is multiplied by.

    From 0 linearly to 1 over ``warmup`` steps, flat, then linearly to 0 over the last ``decay``.
    """
    if step < warmup:
        return step / warmup
    if step < steps - decay:
        return 1.0
    return 0.0 if step >= steps else 1.0 - (step - (steps - decay)) / decay


class Optimiser:
    """AdamW under the trapezoid, with a clip of its own for a router that has a loss of its own.

    An auxiliary router's loss reaches no other parameter, so one AdamW serves both, with a learning
    rate and a gradient norm of their own, as in the released code.

    Args:
        model: whose parameters; frozen ones are in no group.
        section: rates, coefficients and the shape of the trapezoid.
        steps: optimiser steps of the whole run.
        rates: learning rate by group of parameters (:mod:`mor.train.uptrain.groups`), in multiples
            of the main one.

    Attributes:
        adamw: what moves the weights.
        factor: of the trapezoid, at the step that was begun last.
    """

    def __init__(
        self,
        model: nn.Module,
        section: TrainSection,
        steps: int,
        rates: Mapping[str, float] | None = None,
    ) -> None:
        self.section, self.steps = section, steps
        self.warmup, self.decay = trapezoid(section, steps)
        self.parameters = list(model.parameters())
        router = find_router(model)
        apart = router if section.route_by_loss else getattr(router, "auxiliary", None)
        self.auxiliary = [] if apart is None else list(apart.parameters())
        groups = group_parameters(model, section, self.auxiliary)
        if rates:
            groups = split_groups(groups, rate_factors(model, rates), section.learning_rate)
        self.adamw = AdamW(
            groups,
            lr=section.learning_rate,
            betas=(section.adam_beta1, section.adam_beta2),
            eps=section.adam_epsilon,
            fused=True,
        )
        for group in self.adamw.param_groups:
            group["initial_lr"] = group["lr"]
        self.begin_step(0)

    def begin_step(self, step: int) -> None:
        """Set the rates of optimiser step ``step``, 0-based."""
        self.factor = rate_factor(step, self.steps, self.warmup, self.decay)
        for group in self.adamw.param_groups:
            group["lr"] = group["initial_lr"] * self.factor

    @property
    def rate(self) -> float:
        """The learning rate of the first group, for the log."""
        return float(self.adamw.param_groups[0]["lr"])

    def clip(self) -> dict[str, Tensor]:
        """Clip the gradients; an auxiliary router by itself, so that it does not slow the network.

        Returns:
            The norms from before, as float32 scalars, by what an error message calls them.
        """
        own = {id(parameter) for parameter in self.auxiliary}
        rest = [p for p in self.parameters if id(p) not in own]
        found = {}
        if own:
            found["auxiliary router's gradient norm"] = self._clip(self.auxiliary)
        return {"gradient norm": self._clip(rest)} | found

    def _clip(self, parameters: list[nn.Parameter]) -> Tensor:
        norm: Any = nn.utils.clip_grad_norm_(parameters, self.section.max_grad_norm)
        whole = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        return torch.as_tensor(whole).detach().float()

    def step(self) -> None:
        """Move the weights, then drop the gradients."""
        self.adamw.step()
        for parameter in self.parameters:
            parameter.grad = None

    def hyperparameters(self) -> list[dict[str, Any]]:
        """What each group was given: rate, decay and the like."""
        return [
            {name: value for name, value in group.items() if name != "params"}
            for group in self.adamw.param_groups
        ]

    def restore_hyperparameters(self, given: list[dict[str, Any]]) -> None:
        """Put back what a loaded state brought from its own run: a branch may set other numbers."""
        for group, values in zip(self.adamw.param_groups, given, strict=True):
            group.update(values)


def group_parameters(
    model: nn.Module, section: TrainSection, auxiliary: list[nn.Parameter]
) -> list[dict[str, Any]]:
    """AdamW's groups: matrices with weight decay, norms without, an auxiliary router by itself.

    Their order and that of the parameters within them is what ``optimizer.pt`` of a checkpoint is
    read by.
    """
    own = {id(parameter) for parameter in auxiliary}
    named = [(n.lower(), p) for n, p in model.named_parameters() if p.requires_grad]
    decayed = [p for name, p in named if not _NOT_DECAYED.search(name)]
    plain = [p for name, p in named if _NOT_DECAYED.search(name)]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in decayed if id(p) not in own], "weight_decay": section.weight_decay},
        {"params": [p for p in plain if id(p) not in own], "weight_decay": 0.0},
    ]
    apart = [p for p in (*decayed, *plain) if id(p) in own]
    if apart:
        rate = section.learning_rate * section.auxiliary_router_lr_factor
        groups.append({"params": apart, "lr": rate, "weight_decay": section.weight_decay})
    return groups
