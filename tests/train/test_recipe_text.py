"""Recipes as text: what is written is read back."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import yaml
from hypothesis import given
from hypothesis import strategies as st

from mor.config.choices import RouterType
from mor.train import Recipe, dump_recipe, parse_recipe
from tests.tiny import tiny_fields

POSITIVE = st.floats(1e-12, 1e12)
FRACTIONS = st.floats(0, 0.5)


@st.composite
def recipes(draw: st.DrawFn) -> Recipe:
    depths = draw(st.integers(2, 4))
    shares = sorted(draw(st.lists(st.floats(0.01, 1), min_size=depths, max_size=depths)))
    budget = draw(
        st.sampled_from([{"steps": 3}, {"tokens": draw(POSITIVE)}, {"flops": draw(POSITIVE)}])
    )
    raw = tiny_fields(Path("data"), Path("runs"), draw(st.sampled_from(get_args(RouterType))))
    raw["name"] = draw(st.from_regex(r"\A[A-Za-z0-9][A-Za-z0-9._-]{0,8}\Z"))
    raw["model"] |= {
        "num_recursions": depths,
        "router_capacities": shares[::-1],
        "router_temperature": draw(POSITIVE),
        "router_aux_loss_coef": draw(POSITIVE),
        "num_key_value_heads": draw(st.sampled_from([None, 1, 2])),
    }
    raw["train"] |= {
        "budget": budget,
        "learning_rate": draw(POSITIVE),
        "warmup_fraction": draw(FRACTIONS),
        "decay_fraction": draw(FRACTIONS),
        "eval_steps": draw(st.none() | st.integers(1, 9)),
        "report_to": draw(st.sampled_from([None, [], ["tensorboard"], ["wandb", "mlflow"]])),
        "dtype": draw(st.sampled_from(["float32", "bfloat16"])),
    }
    return parse_recipe(raw)


@given(recipes())
def test_what_is_written_is_read_back(recipe: Recipe) -> None:
    assert parse_recipe(yaml.safe_load(dump_recipe(recipe))) == recipe
    assert parse_recipe(recipe.model_dump()) == recipe


def test_a_list_of_one_needs_no_brackets(tmp_path: Path) -> None:
    raw = tiny_fields(tmp_path, tmp_path / "out")
    raw["train"] |= {"report_to": "wandb", "keep_steps": 3, "branches": {"steps": 4}}
    raw["data"].pop("path")
    raw["data"]["mixture"] = {"path": "a", "weight": 1.0}
    recipe = parse_recipe(raw)
    assert recipe.train.report_to == ["wandb"]
    assert recipe.train.keep_steps == [3]
    assert [budget.steps for budget in recipe.train.branches] == [4]
    assert recipe.data.mixture is not None
    assert [str(part.path) for part in recipe.data.mixture] == ["a"]
    for none in ("none", ["none"], []):
        raw["train"]["report_to"] = none
        assert parse_recipe(raw).train.report_to == []
    assert raw["train"]["keep_steps"] == 3  # what was given is left as it was
