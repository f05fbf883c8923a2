"""Every field of a recipe says what it decides, and whatever depends on it asks the field."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from mor.train.recipe.depth import RouteByLossSection
from mor.train.recipe.fields import decided_by, decides, fields_that_decide
from mor.train.recipe.media import AugmentSection
from mor.train.recipe.recipe import Recipe
from mor.train.recipe.sections import Budget, DataSection, MixturePart, Section, TrainSection
from mor.train.recipe.uptrain import DistillSection, GainSection, UptrainSection
from mor.train.state.differences import find_differences
from tests.tiny import tiny_recipe

SECTIONS = (
    Recipe,
    DataSection,
    MixturePart,
    TrainSection,
    Budget,
    UptrainSection,
    DistillSection,
    GainSection,
    RouteByLossSection,
    AugmentSection,
)


def test_these_are_all_sections() -> None:
    ours = {kind for kind in Section.__subclasses__() if kind.__name__ != "ModelSection"}
    assert ours == set(SECTIONS)


@pytest.mark.parametrize("section", SECTIONS)
def test_every_field_says_what_it_decides(section: type[BaseModel]) -> None:
    for name in section.model_fields:
        decided_by(section, name)  # raises where the mark is missing


def test_a_field_without_a_mark_is_noticed() -> None:
    class Marked(BaseModel):
        good: int = decides("length", 1)
        bad: int = 2

    assert decided_by(Marked, "good") == "length"
    with pytest.raises(KeyError, match=r"Marked\.bad does not say what it decides"):
        fields_that_decide(Marked, "length")


OTHER: dict[str, Any] = {
    "learning_rate": 0.5,
    "seed": 3,
    "batch_size": 4,
    "dtype": "bfloat16",
    "logging_steps": 7,
    "threads": 1,
    "compile": True,
    "keep_steps": [3],
    "warmup_steps": 1,
    "depth_schedule": "random",
}


@pytest.mark.parametrize("name", list(OTHER))
def test_what_a_field_decides_is_what_is_compared(name: str, data: Path, tmp_path: Path) -> None:
    began, now = tiny_recipe(data, tmp_path), tiny_recipe(data, tmp_path, **{name: OTHER[name]})
    free = decided_by(TrainSection, name) in ("nothing", "speed")
    assert set(find_differences(began, now)) == (set() if free else {f"train.{name}"})


def test_a_recipe_of_an_earlier_program_says_the_same(data: Path, tmp_path: Path) -> None:
    now = tiny_recipe(data, tmp_path)
    whole = now.model_config_for(300, 0)
    every = now.model | {name: getattr(whole, name) for name in ("conv_kernel", "modality")}
    later = now.model_copy(update={"model": every})
    assert not find_differences(now, later)
    assert not find_differences(later, now)
    other = now.model_copy(update={"model": now.model | {"modality": "audio"}})
    assert find_differences(now, other) == {"model.modality": ("text", "audio")}
