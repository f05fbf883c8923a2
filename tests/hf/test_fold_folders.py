"""Folding a folder: its dtype, what belongs to it, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from mor import MorError
from mor.folder.tokenizer import load_tokenizer
from mor.hf.fold.fold import fold_folder
from mor.hf.fold.plan import Folding
from mor.hf.load import load_model
from tests.hf.folding import save_vanilla
from tests.strategies import random_ids


def test_a_folder_in_its_dtype_with_what_belongs_to_it(tmp_path: Path) -> None:
    source = save_vanilla(tmp_path / "in")
    folding = Folding(3, router="threshold", relaxation="lora", rank=4)
    out = fold_folder(source, tmp_path / "out", folding)
    weights = load_model(out, torch.bfloat16)
    assert weights.dtype == torch.bfloat16
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"
    assert load_tokenizer(out).get_vocab() == load_tokenizer(source).get_vocab()
    notes = json.loads((out / "fold.json").read_text())
    assert (notes["num_recursions"], notes["rank"], notes["shared_layers"]) == (3, 4, [[1], [6]])
    ids = random_ids(0, 1, 9)
    with torch.no_grad():
        assert_close(load_model(out)(ids).logits, load_model(out)(ids).logits)


@pytest.mark.parametrize(
    ("fields", "folding", "words"),
    [
        ({}, {"num_recursions": 1}, "num_recursions=1 folds nothing"),
        ({}, {"num_recursions": 7}, "leaves 6 layers to share; num_recursions=7 needs at least 9"),
        ({"layers": 2}, {"num_recursions": 2}, "needs at least 4 layers"),
        (
            {},
            {"num_recursions": 2, "num_recursion_layers": 4},
            "num_recursion_layers=4 does not fit",
        ),
        (
            {},
            {"num_recursions": 1, "num_recursion_layers": 4, "relaxation": "gains"},
            "relaxation='gains' needs layers that are used twice",
        ),
        ({}, {"num_recursions": 2, "start_gain": 0.5}, "but relaxation='none'"),
        (
            {},
            {"num_recursions": 2, "relaxation": "gains", "start_gain": -1.0},
            r"start_gain=-1.0 must be 0 or more",
        ),
        (
            {},
            {"num_recursions": 3, "init": "average", "relaxation": "gains", "start_gain": 0.0},
            "init='average' .* leaves them no place",
        ),
        (
            {},
            {
                "num_recursions": 2,
                "init": "upper",
                "sharing": "middle_sequence",
                "relaxation": "gains",
                "start_gain": 0.0,
            },
            "sharing='middle_sequence' leaves them no place",
        ),
        (
            {},
            {"num_recursions": 2, "init": "repeat", "num_recursion_layers": 2},
            "num_recursion_layers=2 does not fit: initialization='repeat' leaves nothing out",
        ),
        (
            {},
            {"num_recursions": 2, "init": "repeat", "sharing": "middle_sequence"},
            "sharing='middle_sequence' does not: use cycle",
        ),
        ({}, {"num_recursions": 2, "router": "random"}, "router='random' weighs"),
        ({}, {"num_recursions": 2, "sharing": "spiral"}, "sharing='spiral'"),
        ({}, {"num_recursions": 2, "init": "best"}, "initialization='best'"),
        (
            {},
            {"num_recursions": 2, "sharing": "sequence", "router": "threshold"},
            "router='threshold' needs the block",
        ),
        ({}, {"num_recursions": 2, "router": "threshold", "capacities": (1.0,)}, "has 1 entries"),
        ({}, {"num_recursions": 2, "relaxation": "lora", "rank": 0}, "relaxation_rank=0"),
        ({"words": 62}, {"num_recursions": 2}, "token 'w61' has id 61, but vocab_size=61"),
        (
            {"num_recursions": 2, "num_recursion_layers": 3},
            {"num_recursions": 2},
            "num_recursions=2: the source is folded already",
        ),
    ],
)
def test_what_does_not_fit_is_named_and_nothing_is_written(
    fields: dict[str, Any], folding: dict[str, Any], words: str, tmp_path: Path
) -> None:
    save_vanilla(tmp_path / "in", **fields)
    with pytest.raises(MorError, match=words) as caught:
        fold_folder(tmp_path / "in", tmp_path / "out", Folding(**folding))
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_a_folder_that_is_missing_or_there_already(tmp_path: Path) -> None:
    with pytest.raises(MorError, match="does not exist"):
        fold_folder(tmp_path / "in", tmp_path / "out", Folding(2))
    save_vanilla(tmp_path / "in")
    with pytest.raises(MorError, match="is a folder that is not empty"):
        fold_folder(tmp_path / "in", tmp_path / "in", Folding(2))
