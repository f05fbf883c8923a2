"""Recipes: what is right is read, what is wrong is named before anything runs."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import yaml

from mor.errors import MorError
from mor.recipes import builtin_recipes
from mor.train import RecipeError, load_recipe, parse_recipe
from mor.train.recipe.file import apply_overrides
from tests.tiny import tiny_fields


def fields(**changes: Any) -> dict[str, Any]:
    """A valid recipe with dotted fields changed; ``...`` removes one."""
    raw = copy.deepcopy(tiny_fields(Path("data"), Path("runs")))
    for path, value in changes.items():
        *parents, leaf = path.split("__")
        section = raw
        for part in parents:
            section = section[part]
        if value is ...:
            del section[leaf]
        else:
            section[leaf] = value
    return raw


@pytest.mark.parametrize("name", builtin_recipes())
def test_every_builtin_recipe_is_right(name: str) -> None:
    recipe = load_recipe(name)
    if recipe.uptrain is not None:
        return  # the network is that of the folder it starts from: tests/train/test_uptrain.py
    config = recipe.model_config_for(1000 if name.startswith("demo/") else 49152, 0)
    assert config.family in ("vanilla", "recursive", "mor")


def test_there_are_builtin_recipes() -> None:
    assert {"demo/vanilla", "demo/threshold", "paper/360m-expert-3"} <= set(builtin_recipes())


def test_the_demos_twins_differ_in_routing_alone() -> None:
    twins = [load_recipe(name) for name in builtin_recipes() if name.startswith("demo/")]
    assert len({(t.train.budget.flops, t.data.seq_len, t.train.seed) for t in twins}) == 1
    configs = [twin.model_config_for(2048, 0) for twin in twins]
    assert len({(c.hidden_size, c.num_hidden_layers, c.intermediate_size) for c in configs}) == 1


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"nmae": "x"}, ["nmae is not a field", "did you mean 'name'"]),
        ({"train__lerning_rate": 1.0}, ["train.lerning_rate", "did you mean 'learning_rate'"]),
        ({"train__budget": {"stepps": 1}}, ["train.budget.stepps", "did you mean 'steps'"]),
        ({"model__hiden_size": 8}, ["model.hiden_size", "did you mean 'hidden_size'"]),
        (
            {"data__zzz": 8},
            ["data.zzz is not a field", "known: augment, document_mask, kind, loss_on, mixture"],
        ),
        ({"data__path": ...}, ["data: give exactly one of path, mixture; given: none"]),
        ({"train__budget": ...}, ["train.budget is missing"]),
        ({"model__hidden_size": 8.5}, ["model.hidden_size=8.5", "integer"]),
        ({"model__hidden_size": True}, ["model.hidden_size=True", "integer"]),
        ({"model__hidden_size": -8}, ["model.hidden_size=-8", "at least 1"]),
        ({"model__num_recursions": 0}, ["model.num_recursions=0", "greater than 0"]),
        ({"model__router": "experts"}, ["model.router='experts'", "'expert_choice'"]),
        ({"model__router_alpha": "big"}, ["model.router_alpha='big'", "number"]),
        ({"model__router_aux_loss_coef": math.nan}, ["router_aux_loss_coef=nan", "finite"]),
        ({"model__initializer_range": -0.1}, ["initializer_range=-0.1", "greater than 0"]),
        ({"model__tie_word_embeddings": 1}, ["tie_word_embeddings=1", "boolean"]),
        ({"model__router_capacities": 0.5}, ["router_capacities=0.5", "list"]),
        ({"model__router_capacities": [1.0, "x", 0.1]}, ["router_capacities.1='x'", "number"]),
        ({"model__router_capacities": [0.5, 0.75, 0.1]}, ["rises with depth", "non-increasing"]),
        ({"model__router_capacities": [1.0, 0.5]}, ["2 entries", "num_recursions=3"]),
        ({"model__router_capacities": [1.5, 0.5, 0.1]}, ["model.router_capacities", "(0, 1]"]),
        ({"model__num_recursions": 1}, ["model.router='expert_choice'", "at least 2"]),
        (
            {"model__num_hidden_layers": 9, "model__num_recursion_layers": ...},
            ["model.num_hidden_layers=9", "num_recursions=3", "use 8 or 11"],
        ),
        (
            {"model": {"preset": "360m", "num_hidden_layers": 13}},
            ["model.num_hidden_layers=13", "use 11 or 14"],
        ),
        ({"model": {"preset": "36m"}}, ["model.preset='36m'", "'360m'"]),
        ({"model": {"preset": "360m", "family": "moe"}}, ["model.family='moe'", "'recursive'"]),
        ({"model": {"preset": "360m", "family": "vanilla", "num_recursions": 3}}, ["must be 1"]),
        ({"model": {"family": "mor"}}, ["model.family='mor' belongs to model.preset"]),
        ({"model": None}, ["model=None", "dictionary"]),
        ({"train__batch_size": "8"}, ["train.batch_size='8'", "integer"]),
        ({"train__batch_size": 0}, ["train.batch_size=0", "greater than or equal to 1"]),
        ({"train__learning_rate": math.nan}, ["train.learning_rate=nan", "finite"]),
        ({"train__learning_rate": -1.0}, ["train.learning_rate=-1.0", "greater than 0"]),
        ({"train__dtype": "float16"}, ["train.dtype='float16'", "'bfloat16'"]),
        ({"train__warmup_fraction": 0.9}, ["warmup_fraction=0.9", "add up to at most 1"]),
        ({"train__report_to": ["wandbb"]}, ["report_to=['wandbb']", "did you mean 'wandb'?"]),
        ({"train__report_to": "wandbb"}, ["train.report_to", "did you mean 'wandb'?"]),
        ({"train__report_to": 3}, ["train.report_to", "string"]),
        ({"train__branches": {"steps": 0}}, ["train.branches", "steps"]),
        ({"train__keep_steps": "soon"}, ["train.keep_steps", "integer"]),
        (
            {"data__path": ..., "data__mixture": {"path": "a", "wieght": 1}},
            ["data.mixture", "did you mean 'weight'?"],
        ),
        ({"train__depth_schedule": 3}, ["train.depth_schedule"]),
        ({"train__budget": {}}, ["train.budget", "exactly one", "none"]),
        ({"train__budget": {"steps": 1, "tokens": 5}}, ["exactly one", "steps=1 and tokens=5"]),
        ({"train__budget": {"steps": 0}}, ["train.budget.steps=0"]),
        ({"train__budget": {"flops": -1.0}}, ["train.budget.flops=-1.0"]),
        ({"train__budget": {"flops": math.inf}}, ["train.budget.flops=inf", "finite"]),
        ({"train__budget": {"tokens": math.nan}}, ["train.budget.tokens=nan", "finite"]),
        ({"train": 3}, ["train=3"]),
        ({"data__seq_len": 1}, ["data.seq_len=1", "greater than or equal to 2"]),
        ({"data__seq_len": 65}, ["data.seq_len=65", "max_position_embeddings=64"]),
        ({"data__seq_len": "long"}, ["data.seq_len='long'", "integer"]),
        ({"data__path": 3}, ["data.path=3", "path"]),
        ({"data__mixture": [{"path": "a", "weight": 1}]}, ["one of path, mixture; given: both"]),
        (
            {"data__path": ..., "data__mixture": [{"path": "a", "wieght": 1}]},
            ["data.mixture.0.wieght is not a field; did you mean 'weight'?"],
        ),
        (
            {"data__path": ..., "data__mixture": [{"path": "a", "weight": 0}]},
            ["data.mixture.0.weight=0", "greater than 0"],
        ),
        ({"data__path": ..., "data__mixture": []}, ["data.mixture", "at least 1 item"]),
        ({"data__packing": "tight"}, ["data.packing='tight'", "'best_fit'"]),
        ({"name": "../up"}, ["name='../up'"]),
    ],
)
def test_a_wrong_recipe_is_one_clear_error(changes: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(RecipeError) as caught:
        parse_recipe(fields(**changes), "r.yaml")
    message = str(caught.value)
    assert message.startswith("r.yaml: ")
    assert "\n" not in message
    for word in words:
        assert word in message
    assert isinstance(caught.value, MorError)


def test_all_mistakes_are_named_at_once() -> None:
    with pytest.raises(RecipeError) as caught:
        parse_recipe(fields(train__batch_size=0, model__hiden_size=1, nmae="x"))
    assert all(word in str(caught.value) for word in ("batch_size", "hiden_size", "nmae"))


@pytest.mark.parametrize("raw", [None, [], "text", 3])
def test_something_else_than_a_mapping(raw: Any) -> None:
    with pytest.raises(RecipeError, match="must hold a mapping"):
        parse_recipe(raw)


def test_the_datas_vocabulary_is_the_models() -> None:
    recipe = parse_recipe(fields())
    config = recipe.model_config_for(300, 7)
    assert (config.vocab_size, config.eos_token_id, config.bos_token_id) == (300, 7, 7)
    named = parse_recipe(fields(model={"preset": "135m"}, data__seq_len=2048))
    assert named.model_config_for(300, 7).vocab_size == 300
    assert named.model_config_for(300, 7).eos_token_id == 7


def test_a_vocabulary_smaller_than_the_datas() -> None:
    recipe = parse_recipe(fields(model__vocab_size=100))
    with pytest.raises(RecipeError, match="vocab_size=100 is smaller than the data's 300"):
        recipe.model_config_for(300, 0)


def test_layers_may_be_given_unrolled() -> None:
    raw = fields(model__num_hidden_layers=8, model__num_recursion_layers=...)
    assert parse_recipe(raw).model_config_for(300, 0).num_recursion_layers == 2


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_load_and_override(tmp_path: Path) -> None:
    path = write(tmp_path / "r.yaml", yaml.safe_dump(fields()))
    changes = ["train.learning_rate=3e-3", "model.router=threshold", "train.budget.tokens=1e6"]
    recipe = load_recipe(path, changes)
    assert recipe.train.learning_rate == 0.003
    assert recipe.model["router"] == "threshold"
    assert recipe.train.budget.model_dump(exclude_none=True) == {"tokens": 1e6}


def test_numbers_are_read_as_people_write_them(tmp_path: Path) -> None:
    text = yaml.safe_dump(fields(model__router_z_loss_coef="Z", train__learning_rate="L"))
    text = text.replace("coef: Z", "coef: 1e-5").replace("rate: L", "rate: 3E-3")
    recipe = load_recipe(write(tmp_path / "r.yaml", text))
    assert recipe.model["router_z_loss_coef"] == 1e-5
    assert recipe.train.learning_rate == 3e-3


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ("train.learning_rate", "must look like train.learning_rate=1e-3"),
        ("=3", "must look like"),
        ("name.x=3", "'name' is a value, not a section"),
        ("train.learning_rate.x=3", "'learning_rate' is a value, not a section"),
        ("name=[1", "is not a YAML value"),
        ("train.bacth_size=3", "did you mean 'batch_size'"),
        ("name=", "name=None"),
    ],
)
def test_wrong_overrides(tmp_path: Path, entry: str, words: str) -> None:
    path = write(tmp_path / "r.yaml", yaml.safe_dump(fields()))
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, [entry])
    assert words in str(caught.value)


def test_overrides_leave_the_original_alone() -> None:
    raw = fields()
    before = copy.deepcopy(raw)
    assert apply_overrides(raw, ["data.seq_len=32"])["data"]["seq_len"] == 32
    assert raw == before


@pytest.mark.parametrize(
    ("content", "words"),
    [("a: [1", "is not YAML"), ("- 1", "must hold a mapping"), ("", "must hold a mapping")],
)
def test_files_that_are_no_recipe(tmp_path: Path, content: str, words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        load_recipe(write(tmp_path / "r.yaml", content))


def test_binary_file(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RecipeError, match="is not YAML"):
        load_recipe(tmp_path / "r.yaml")


def test_missing_file() -> None:
    with pytest.raises(RecipeError, match=r"'demo/treshold' does not exist; did you mean demo/thr"):
        load_recipe("demo/treshold")
    with pytest.raises(RecipeError, match="'nothing' does not exist"):
        load_recipe("nothing")
