"""Model folders: what is whole is loaded, what is not is named in one sentence."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mor.data import train_tokenizer
from mor.engine.opening import load_servable
from mor.errors import MorError
from mor.folder.network import load_network
from mor.folder.tokenizer import load_tokenizer
from mor.hf.load import load_model
from tests.strategies import make_model, random_ids, small_config


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder with its tokenizer; read only."""
    folder = tmp_path_factory.mktemp("models") / "whole"
    make_model(small_config("threshold", tie_word_embeddings=False)).save_pretrained(folder)
    train_tokenizer(["the king"], 300).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    """A copy to harm."""
    return Path(shutil.copytree(whole, tmp_path / "model"))


def test_a_whole_folder(whole: Path, capfd: pytest.CaptureFixture[str]) -> None:
    model = load_model(whole)
    assert not model.training
    ids = random_ids(0, 1, 9)
    made = make_model(small_config("threshold", tie_word_embeddings=False))
    assert torch.equal(model(ids).logits, made(ids).logits)
    assert load_tokenizer(whole).eos_token_id == 0
    assert capfd.readouterr() == ("", "")


def test_dtype(whole: Path) -> None:
    assert load_model(whole, torch.bfloat16).dtype == torch.bfloat16


def test_a_run_folder(folder: Path) -> None:
    (folder.parent / "summary.json").write_text("{}")
    assert load_model(folder.parent).config.router == "threshold"
    assert load_tokenizer(folder.parent).pad_token_id == 1


def fields(**changes: Any) -> Callable[[Path], None]:
    def harm(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return harm


def tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def harm(folder: Path) -> None:
        path = folder / "model.safetensors"
        content = load_file(path)
        change(content)
        save_file(content, path, {"format": "pt"})

    return harm


def cut(name: str, bytes_left: float) -> Callable[[Path], None]:
    def harm(folder: Path) -> None:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: int(bytes_left * len(content))])

    return harm


NORM = "model.norm.weight"


@pytest.mark.parametrize("load", [load_model, load_network, load_servable])
@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (lambda f: (f / "config.json").unlink(), "config.json is missing"),
        (cut("config.json", 0.5), "config.json is not a JSON object; the checkpoint is damaged"),
        (lambda f: (f / "config.json").write_text("[]"), "is not a JSON object"),
        (fields(model_type="llama"), "model_type='llama', not 'mor'; convert it first: mor conv"),
        (fields(router_capacities=[0.1, 0.5, 1.0]), "config.json: router_capacities=[0.1, 0.5"),
        (fields(router_capacities="all"), "router_capacities='all' must be a list of 3 numbers"),
        (fields(hidden_size="wide"), "hidden_size='wide'"),
        (cut("model.safetensors", 0.9), "damaged or cut short"),
        (cut("model.safetensors", 0.0), "damaged or cut short"),
        (lambda f: (f / "model.safetensors").unlink(), "a file is missing"),
        (tensors(lambda t: t.pop(NORM)), f"weights missing (1): {NORM}"),
        (tensors(lambda t: t.pop("model.lm_head.weight")), "weights missing (1): model.lm_head"),
        (tensors(lambda t: t.pop("model.router.boundary")), "missing (1): model.router.boundary"),
        (tensors(lambda t: t.update(more=torch.ones(2))), "weights not known (1): more"),
        (tensors(lambda t: t.update({NORM: torch.ones(5)})), f"of another shape (1): {NORM}"),
    ],
)
def test_a_folder_that_is_not_whole(
    load: Callable[[Path], Any],
    harm: Callable[[Path], Any],
    words: str,
    folder: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    harm(folder)
    with pytest.raises(MorError) as caught:
        load(folder)
    message = str(caught.value)
    assert words in message
    assert str(folder) in message
    assert "\n" not in message
    assert capfd.readouterr() == ("", "")


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(MorError, match="'nothing' does not exist"):
        load_model("nothing")
    with pytest.raises(MorError, match=r"is no model folder: config\.json is missing"):
        load_model(tmp_path)


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (lambda f: (f / "tokenizer_config.json").unlink(), "holds no tokenizer"),
        (cut("tokenizer.json", 0.5), "is damaged"),
        (cut("tokenizer_config.json", 0.5), "is damaged"),
        (lambda f: (f / "tokenizer.json").unlink(), "is damaged"),
    ],
)
def test_tokenizers(harm: Callable[[Path], Any], words: str, folder: Path) -> None:
    harm(folder)
    with pytest.raises(MorError, match=words) as caught:
        load_tokenizer(folder)
    assert "\n" not in str(caught.value)
