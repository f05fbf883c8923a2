"""How two recipes differ, as far as weights are concerned.

What a field decides is said on the field itself (:func:`mor.train.recipe.fields.decides`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from mor.errors import MorError
from mor.train.recipe.fields import fields_that_decide
from mor.train.recipe.recipe import Recipe, parse_recipe
from mor.train.recipe.sections import Section, TrainSection

Changes = dict[str, tuple[Any, Any]]
"""Dotted name of a field to its two values, the earlier one first."""


def read_recipe(path: Path) -> Recipe:
    """The recipe that a run folder keeps.

    Raises:
        MorError: it is not there, or cannot be read.
    """
    try:
        return parse_recipe(yaml.safe_load(path.read_text(encoding="utf-8")), str(path))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise MorError(f"{path} cannot be read: {error}") from None


def find_differences(began: Recipe, now: Recipe) -> Changes:
    """Fields that decide the weights and differ."""
    old, new = _decisive(began), _decisive(now)
    names = sorted(old | new)
    return {n: (old.get(n), new.get(n)) for n in names if old.get(n) != new.get(n)}


def find_optimiser_changes(began: Recipe, now: Recipe) -> Changes:
    """What a branch changes of the optimiser."""
    tuned = {f"train.{name}" for name in fields_that_decide(TrainSection, "optimiser")}
    return {n: pair for n, pair in find_differences(began, now).items() if n in tuned}


def describe_changes(changed: Changes) -> str:
    """The first differences in words."""
    pairs = list(changed.items())[:3]
    return ", ".join(f"{name}={new!r} was {old!r}" for name, (old, new) in pairs)


def _decisive(recipe: Recipe) -> dict[str, Any]:
    """Fields that decide the weights, by dotted name."""
    model = recipe.model_dump(mode="json")["model"]
    flat: dict[str, Any] = {f"model.{name}": value for name, value in model.items()}
    for name in ("data", "train", "uptrain"):
        section = getattr(recipe, name)
        if section is not None:
            flat |= {f"{name}.{field}": value for field, value in _kept(section).items()}
    if recipe.train.global_batch_size is not None:  # how a step's batch is cut up does not matter
        for field in fields_that_decide(TrainSection, "batch split"):
            del flat[f"train.{field}"]
    return flat


def _kept(section: Section) -> dict[str, Any]:
    """The values of the fields that decide weights, as JSON has them."""
    kind = type(section)
    kept = set(kind.model_fields) - fields_that_decide(kind, "nothing", "speed")
    plain = section.model_dump(mode="json", include=kept)
    for name in kept:
        value = getattr(section, name)
        if isinstance(value, list) and value and isinstance(value[0], Section):
            parts = [_kept(part) for part in value]  # folders of a mixture may move
            alone = all(len(part) == 1 for part in parts)
            plain[name] = [next(iter(part.values())) for part in parts] if alone else parts
    return plain
