"""What uptraining refuses, before it takes a run folder."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from mor.errors import MorError
from mor.hf.convert.llama import plain_depth
from mor.recipes import builtin_recipes
from mor.train import load_recipe, parse_recipe
from mor.train.uptrain.start import resolve_model
from tests.train.uptraining import fields, other_model


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"freeze": ["embedings"]}, r"uptrain.freeze='embedings' is no group.*did you mean 'embed"),
        ({"freeze": ["routers"]}, r"uptrain.freeze='routers' matches no parameter"),
        ({"freeze": ["re:("]}, r"uptrain.freeze='re:\(' is no pattern"),
        ({"freeze": ["re:."]}, r"leaves nothing to train"),
        ({"rates": {"routers": 2.0}}, r"uptrain.rates='routers' matches no parameter"),
        ({"rates": {"norms": 2.0}, "freeze": ["norms"]}, r"uptrain.rates='norms' is frozen"),
        ({"model": {"hidden_size": 32}}, r"model.hidden_size=32 differs .* which has 16"),
        ({"model": {"router": "random"}}, r"model.router='random' weighs tokens by chance"),
        ({"distill": {"top_k": 300}}, r"top_k=300 must be below the vocabulary's 300"),
        ({"train": {"parallel": "fsdp"}}, r"fsdp"),
        ({"train": {"branches": [{"steps": 2}]}}, r"branch_from do not go with uptrain"),
    ],
)
def test_refusals(uptrain: Any, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(MorError, match=words):
        uptrain(**changes)


def test_teachers_that_do_not_fit(uptrain: Any, tmp_path: Path, folded: Path) -> None:
    words = other_model(tmp_path / "words", vocab_size=310)
    with pytest.raises(MorError, match=r"vocab_size=310, the student 300"):
        uptrain(distill={"teacher": str(words)})
    wide = other_model(tmp_path / "wide", hidden_size=32)
    with pytest.raises(MorError, match=r"hidden_size=32, the student 16; set .*hidden=0"):
        uptrain(distill={"teacher": str(wide)})
    with pytest.raises(MorError, match="is recursive; name the vanilla model"):
        uptrain(distill={"teacher": str(folded)})
    with pytest.raises(MorError, match="does not exist"):
        uptrain(distill={"teacher": str(tmp_path / "nowhere")})


def test_starts_that_are_none(uptrain: Any, tmp_path: Path) -> None:
    with pytest.raises(MorError, match=r"model folder .*nowhere' does not exist"):
        uptrain(start=tmp_path / "nowhere")
    with pytest.raises(MorError, match="nor is it that of a finished run"):
        uptrain(start=tmp_path)
    (tmp_path / "llama").mkdir()
    (tmp_path / "llama" / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(MorError, match="has model_type='llama', not 'mor'; convert it first"):
        uptrain(start=tmp_path / "llama")
    (tmp_path / "llama" / "config.json").write_text("{")
    with pytest.raises(MorError, match="damaged: it names no model_type"):
        uptrain(start=tmp_path / "llama")


def test_a_map_that_is_missing_or_wrong(uptrain: Any, tmp_path: Path, folded: Path) -> None:
    deep = other_model(tmp_path / "deep", **plain_depth(8))
    copied = tmp_path / "copied"
    shutil.copytree(folded, copied)
    (copied / "fold.json").unlink()
    with pytest.raises(MorError, match=r"needs to know which of the teacher's 8 layers"):
        uptrain(start=copied, distill={"teacher": str(deep)})
    (copied / "fold.json").write_text('{"stack": [0, 1, 2]}')
    with pytest.raises(MorError, match=r"lists 3 layers .* belongs to another model"):
        uptrain(start=copied)
    (copied / "fold.json").write_text("{")
    with pytest.raises(MorError, match=r"fold.json is damaged"):
        uptrain(start=copied)


@pytest.mark.parametrize(
    ("uptrain", "words"),
    [
        ({"distill": {"logits": 0.0, "hidden": 0.0}}, "distil nothing"),
        ({"distill": {"cache": "x"}}, "cache needs top_k"),
        ({"distill": {"temprature": 2.0}}, "did you mean 'temperature'"),
        ({"freezes": []}, "did you mean 'freeze'"),
        ({"rates": {"routers": 0.0}}, "must be above 0"),
    ],
)
def test_sections_are_checked(uptrain: dict[str, Any], words: str) -> None:
    with pytest.raises(MorError, match=words):
        parse_recipe(fields(Path("d"), Path("o"), Path("s"), Path("f"), **uptrain))


def test_a_model_with_a_router_keeps_it(uptrain: Any) -> None:
    first = uptrain(model={"router": "threshold"}, train={"budget": {"steps": 1}})
    with pytest.raises(MorError, match="has a router already, 'threshold'"):
        uptrain(start=first, name="second", model={"router": "token_choice"})


def test_the_recipe_of_a_run_reads_the_same(uptrain: Any) -> None:
    folder = uptrain(model={"router": "threshold"}, train={"budget": {"steps": 1}})
    known = load_recipe(folder / "recipe.yaml")
    assert resolve_model(known).model == known.model


def test_recipes_that_come_along() -> None:
    names = [name for name in builtin_recipes() if name.startswith("uptrain/")]
    assert len(names) >= 2
    for name in names:
        assert load_recipe(name).uptrain is not None
