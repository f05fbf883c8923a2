"""Weights begin on a cache line wherever they come from: a product's last bits may hang on it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from mor import MoRForCausalLM
from mor.folder.weights import read_weights
from mor.hf.convert.assemble import assemble, stack_plan
from mor.hf.convert.convert import convert_authors, convert_gguf, convert_llama
from mor.hf.convert.llama import llama_config
from mor.hf.fold.fold import fold_folder
from mor.hf.fold.plan import Folding
from mor.hf.load import load_model
from mor.model.packed import serving_view
from mor.ops.alignment import CACHE_LINE, align_weights, aligned
from mor.train.state.sharded import load_weights, merge
from tests.hf.checkpoints import EXPERT, VANILLA, golden, write
from tests.hf.gguf_files import model_of, write_gguf
from tests.hf.test_convert_llama import llama_folder
from tests.strategies import make_model, random_ids, small_config


def off_line(tensor: Tensor, by: int = 56) -> Tensor:
    """The same numbers, ``by`` bytes past a cache line, as safetensors maps them."""
    room = torch.empty(tensor.nbytes + 2 * CACHE_LINE, dtype=torch.uint8)
    begin = -room.data_ptr() % CACHE_LINE + by
    moved = room[begin : begin + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
    moved.copy_(tensor.detach())
    assert moved.data_ptr() % CACHE_LINE == by
    return moved


def misplaced(module: nn.Module) -> list[str]:
    """Names of the weights and constants that do not begin on a cache line."""
    every = [*module.named_parameters(), *module.named_buffers()]
    return [name for name, tensor in every if tensor.data_ptr() % CACHE_LINE]


def a_folder(folder: Path, **fields: Any) -> Path:
    make_model(small_config("threshold", **fields)).save_pretrained(folder)
    return folder


def shift_data(folder: Path, by: int) -> None:
    """Write the file anew, so that its tensors begin ``by`` bytes past a cache line."""
    file = folder / "model.safetensors"
    content = {name: tensor.clone() for name, tensor in load_file(file).items()}  # no map of it
    for length in range(CACHE_LINE):
        save_file(content, file, {"format": "pt", "room": " " * length})
        header = int.from_bytes(file.read_bytes()[:8], "little")
        if (8 + header) % CACHE_LINE == by:
            return
    raise AssertionError


@pytest.mark.parametrize("load", [load_model, AutoModelForCausalLM.from_pretrained])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("by", [0, 8, 32, 56])
def test_model_folders(load: Callable[..., Any], tied: bool, by: int, tmp_path: Path) -> None:
    a_folder(tmp_path, tie_word_embeddings=tied)
    shift_data(tmp_path, by)
    model = load(tmp_path)
    assert not misplaced(model)
    assert (model.model.lm_head.weight is model.model.embed_tokens.weight) == tied
    made = make_model(small_config("threshold", tie_word_embeddings=tied))
    for name, tensor in made.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name
    # Two programs over the same numbers, both aligned: the same bits on every processor.
    ids = random_ids(0, 2, 9)
    assert torch.equal(model(ids).logits, made(ids).logits)


def test_a_folder_of_several_files_and_its_loading_report(tmp_path: Path) -> None:
    make_model(small_config("expert_choice")).save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    model, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not misplaced(model)
    assert not report["missing_keys"]


@pytest.mark.parametrize("save", ["safetensors", "sharded", "bin"])
def test_a_llama_that_is_converted_and_folded(save: str, tmp_path: Path) -> None:
    llama_folder(tmp_path / "llama", save)
    plain = convert_llama(tmp_path / "llama", tmp_path / "plain")
    assert not misplaced(load_model(plain))
    folded = fold_folder(plain, tmp_path / "folded", Folding(num_recursions=2))
    assert not misplaced(load_model(folded))


def test_checkpoints_of_the_authors_and_gguf_files(tmp_path: Path) -> None:
    weights, config = golden(EXPERT)
    theirs = convert_authors(*write(tmp_path / "in", weights, config), tmp_path / "theirs")
    assert not misplaced(load_model(theirs))
    read = read_weights(tmp_path / "in")
    assert not any(tensor.data_ptr() % CACHE_LINE for tensor in read.values())
    file = write_gguf(tmp_path / "tiny.gguf", model_of())
    assert not misplaced(load_model(convert_gguf(file, tmp_path / "gguf")))


def test_a_model_that_is_put_together(tmp_path: Path) -> None:
    weights, config = golden(VANILLA)
    ours = llama_config(config["hf_config"] | {"model_type": "llama"}, "config")
    moved = {name: off_line(tensor) for name, tensor in weights.items()}
    model = assemble(ours, stack_plan(ours), moved, tmp_path)
    assert not misplaced(model)
    assert torch.equal(model.model.norm.weight, weights["model.norm.weight"])


def test_checkpoints_merged_and_resumed(tmp_path: Path) -> None:
    a_folder(tmp_path / "checkpoint")
    merge(tmp_path / "checkpoint", tmp_path / "merged")
    assert not misplaced(load_model(tmp_path / "merged"))
    model = MoRForCausalLM(small_config("threshold"))
    load_weights(model, tmp_path / "checkpoint")
    assert not misplaced(model)


@pytest.mark.parametrize("assign", [True, False])
def test_a_state_dict(assign: bool) -> None:
    model = make_model(small_config("threshold"))
    state = {name: off_line(tensor) for name, tensor in model.state_dict().items()}
    state["model.lm_head.weight"] = state["model.embed_tokens.weight"]
    other = MoRForCausalLM(model.config)
    other.load_state_dict(state, assign=assign)
    assert not misplaced(other)
    head, embedding = other.model.lm_head.weight, other.model.embed_tokens.weight
    assert head.data_ptr() == embedding.data_ptr()  # two names, one memory, as before
    for name, tensor in model.state_dict().items():
        assert torch.equal(other.state_dict()[name], tensor)


def test_a_view_for_serving_shares_what_was_aligned(tmp_path: Path) -> None:
    view = serving_view(load_model(a_folder(tmp_path, head_dim=16)).model)
    assert not misplaced(view)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_tensor_is_moved_only_where_it_has_to_be(dtype: torch.dtype) -> None:
    whole = torch.randn(6, 5).to(dtype)
    assert aligned(whole) is whole
    for by in (8, 16, 56):
        found = aligned(off_line(whole, by))
        assert found.data_ptr() % CACHE_LINE == 0
        assert torch.equal(found, whole)
    turned = aligned(off_line(whole).T)
    assert torch.equal(turned, whole.T)
    assert turned.stride() == whole.T.stride()
    assert aligned(torch.empty(3, device="meta")).device.type == "meta"


def test_a_trained_weight_stays_the_parameter_it_is() -> None:
    module = nn.Linear(3, 5)
    module.weight.data = off_line(module.weight)
    before, values = module.weight, module.weight.detach().clone()
    optimiser = torch.optim.SGD(module.parameters(), 0.1)
    align_weights(module)
    assert module.weight is before
    assert not misplaced(module)
    module(torch.ones(2, 3)).sum().backward()
    optimiser.step()
    assert torch.equal(module.weight, values - 0.1 * 2)
