from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from mor import MoRConfig, MoRForCausalLM
from mor.hf.convert.llama import plain_depth
from mor.hf.fold.fold import fold_folder
from mor.hf.fold.plan import Folding
from mor.train import Recipe, parse_recipe, train
from tests.tiny import prepare_tiny, tiny_recipe
from tests.train import stopping
from tests.train.uptraining import WIDE, fields


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared data folder; read only."""
    return prepare_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Path:
    """A vanilla model of six layers, with the data's tokenizer."""
    folder = tmp_path_factory.mktemp("models") / "source"
    torch.manual_seed(0)
    config = MoRConfig(vocab_size=300, initializer_range=0.3, **WIDE, **plain_depth(6))
    MoRForCausalLM(config).save_pretrained(folder)
    for path in (data / "tokenizer").iterdir():
        shutil.copy(path, folder / path.name)
    return folder


@pytest.fixture(scope="session")
def folded(source: Path) -> Path:
    """Folded to 1 + 2 x 2 + 1, with a little LoRA."""
    out = source.parent / "folded"
    return fold_folder(source, out, Folding(2, relaxation="lora", rank=2))


@pytest.fixture
def uptrain(data: Path, tmp_path: Path, source: Path, folded: Path) -> Any:
    """Train with changes of ``uptrain``, ``model`` and, as ``train``, of training."""

    def go(resume: bool = False, **changes: Any) -> Path:
        training = changes.pop("train", {})
        name = changes.pop("name", "up")
        raw = fields(data, tmp_path, source, changes.pop("start", folded), **changes)
        raw["train"] |= training
        return train(parse_recipe(raw | {"name": name}), resume=resume)

    return go


@pytest.fixture(scope="session")
def whole(data: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """Weights of the run that nothing disturbs."""
    return stopping.weights(
        train(tiny_recipe(data, tmp_path_factory.mktemp("whole"), **stopping.fields()))
    )


@pytest.fixture
def recipe(data: Path, tmp_path: Path) -> Recipe:
    return tiny_recipe(data, tmp_path, **stopping.fields())
