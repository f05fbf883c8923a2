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
    """Fields that decide the weights and differ.

    A field of the model that one recipe does not name counts as what it stands for there: recipes
    of earlier programs do not know the fields of later ones.
    """
    old, new = _decisive(began), _decisive(now)
    old, new = old | _unnamed(began, old, new), new | _unnamed(now, new, old)
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


# What the data say where a recipe does not.
_OF_DATA = ("vocab_size", "bos_token_id", "eos_token_id", "add_bos_token", "pad_token_id")


def _unnamed(recipe: Recipe, own: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """What fields of the model stand for in ``recipe`` that ``other`` alone names."""
    names = {name for name in other if name.startswith("model.")} - set(own)
    fields = {name.removeprefix("model.") for name in names} - set(_OF_DATA)
    if not fields:
        return {}
    try:
        config = recipe.model_config_for(1, None)
    except MorError:  # said where it is used
        return {}
    return {f"model.{name}": getattr(config, name) for name in fields if hasattr(config, name)}


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
