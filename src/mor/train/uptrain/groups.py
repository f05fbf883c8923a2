"""Groups of parameters by name: their learning rates, and which of them stay as they are."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from mor.errors import MorError
from mor.train.recipe.sections import suggest

GROUPS = {
    "embeddings": r"\b(embed_tokens|lm_head)\.",
    "prelude": r"\bprelude_layers\.",
    "block": r"\bblock\.",
    "coda": r"\bcoda_layers\.",
    "norms": r"norm\.weight$",
    "routers": r"\brouter\.",
    "trunk": r"^(?!.*\brouter\.)",
    "relaxation": r"\b(low_rank|attention_gain|mlp_gain|depth_embedding)\.",
}
"""Groups that have a name; one parameter may belong to several. ``re:PATTERN`` makes others."""


def parameters_of_group(model: nn.Module, group: str, field: str) -> dict[str, nn.Parameter]:
    """The parameters of ``group`` by name.

    Args:
        model: whose.
        group: a key of :data:`GROUPS`, or ``re:`` and a pattern that is searched in the names.
        field: where the group was asked for, for the message.

    Raises:
        MorError: there is no such group, the pattern is malformed, or nothing belongs to it.
    """
    pattern = group[3:] if group.startswith("re:") else GROUPS.get(group)
    if pattern is None:
        hint = suggest(group, sorted(GROUPS))
        raise MorError(f"{field}={group!r} is no group of parameters{hint}; or write re:PATTERN")
    try:
        found = {n: p for n, p in model.named_parameters() if re.search(pattern, n)}
    except re.error as error:
        raise MorError(f"{field}={group!r} is no pattern: {error}") from None
    if not found:
        raise MorError(f"{field}={group!r} matches no parameter of this model; leave it out")
    return found


def freeze(model: nn.Module, groups: Iterable[str]) -> None:
    """Stop the gradients of every parameter of ``groups``.

    Raises:
        MorError: see :func:`parameters_of_group`; or nothing is left to train.
    """
    for group in groups:
        for parameter in parameters_of_group(model, group, "uptrain.freeze").values():
            parameter.requires_grad_(False)
    if not any(p.requires_grad for p in model.parameters()):
        raise MorError(f"uptrain.freeze={list(groups)} leaves nothing to train; freeze less")


def rate_factors(model: nn.Module, rates: Mapping[str, float]) -> dict[int, float]:
    """Factor by ``id`` of a parameter, where one was asked for; of several groups the first.

    Raises:
        MorError: see :func:`parameters_of_group`; or all of a group is frozen.
    """
    factors: dict[int, float] = {}
    for group, factor in rates.items():
        moving = [
            p
            for p in parameters_of_group(model, group, "uptrain.rates").values()
            if p.requires_grad
        ]
        if not moving:
            raise MorError(f"uptrain.rates={group!r} is frozen; it has no learning rate")
        for parameter in moving:
            factors.setdefault(id(parameter), factor)
    return factors


def split_groups(
    groups: list[dict[str, Any]], factors: Mapping[int, float], rate: float
) -> list[dict[str, Any]]:
    """Optimiser groups split so that each holds parameters of one factor, their rates multiplied.

    Args:
        groups: of an optimiser that has not stepped yet.
        factors: by ``id`` of a parameter; 1 where it is missing.
        rate: of a group that names none.
    """
    result = []
    for group in groups:
        parts: dict[float, list[nn.Parameter]] = {}
        for parameter in group["params"]:
            parts.setdefault(factors.get(id(parameter), 1.0), []).append(parameter)
        for factor, parameters in parts.items():
            lr = group.get("lr", rate) * factor
            result.append({**group, "params": parameters, "lr": lr})
    return result
