"""Weights stay shared, routers stay exact, through everything Transformers does to a model."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from safetensors import SafetensorError, safe_open
from torch.testing import assert_close
from transformers import AutoConfig, AutoModelForCausalLM, initialization

from mor import MoRConfig, MoRForCausalLM
from tests.strategies import (
    KV_SHARING,
    ROUTERS,
    SEEDS,
    configs,
    make_model,
    random_ids,
    small_config,
)

# One folder for all examples is right here: each example writes all of it anew.
same_folder = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])


def logits(model: MoRForCausalLM, **how: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(random_ids(0, 2, 11), **how).logits


def unique_bytes(model: MoRForCausalLM) -> int:
    """Bytes of every parameter and buffer, shared ones once."""
    tensors = [*model.parameters(), *model.buffers()]
    return sum({t.data_ptr(): t.nbytes for t in tensors if t.numel()}.values())


def check_tied(model: MoRForCausalLM) -> None:
    network = model.model
    tied = network.lm_head.weight is network.embed_tokens.weight
    assert tied == model.config.tie_word_embeddings
    assert len(network.block) == model.config.num_recursion_layers


@same_folder
@given(configs(), SEEDS)
def test_saved_and_loaded_is_the_same_model(
    tmp_path_factory: pytest.TempPathFactory, config: MoRConfig, seed: int
) -> None:
    folder = tmp_path_factory.mktemp("model")
    model = make_model(config, seed)
    model.save_pretrained(folder)
    loaded, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert type(loaded) is MoRForCausalLM
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert loaded.config.to_dict() == AutoConfig.from_pretrained(folder).to_dict()
    assert not loaded.training
    ours, theirs = model.state_dict(), loaded.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    check_tied(loaded)
    for routing in ("causal", "topk"):
        assert torch.equal(logits(model, routing=routing), logits(loaded, routing=routing))


@given(configs(), SEEDS)
def test_initialising_leaves_loaded_weights_alone(config: MoRConfig, seed: int) -> None:
    """Some versions of Transformers initialise every module once more after loading."""
    model = make_model(config, seed)
    for tensor in (*model.parameters(), *model.buffers()):
        tensor._is_hf_initialized = True  # type: ignore[attr-defined]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with initialization.guard_torch_init_functions():
        for module in model.modules():
            model._init_weights(module)
    after = model.state_dict()
    assert [name for name in before if not torch.equal(before[name], after[name])] == []


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("router", ROUTERS)
def test_one_copy_of_each_shared_tensor_is_written(tmp_path: Path, router: str, tied: bool) -> None:
    """One file, whose data is as long as the unrolled stack is not."""
    model = make_model(small_config(router, tie_word_embeddings=tied, num_recursion_layers=2))
    model.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    with safe_open(path, "pt") as stored:
        names = list(stored.keys())
        sizes = [stored.get_tensor(name).nbytes for name in names]
    header = int.from_bytes(path.read_bytes()[:8], "little")
    assert path.stat().st_size == 8 + header + sum(sizes)
    assert sum(sizes) == unique_bytes(model)
    config = model.config
    attention = 2 * config.hidden_size * (4 + 2) * config.head_dim
    layer = attention + 3 * config.hidden_size * config.intermediate_size + 2 * config.hidden_size
    table = config.vocab_size * config.hidden_size
    body = 4 * layer + config.hidden_size + (1 if tied else 2) * table  # 1 + 2 + 1 layers, not 8
    routers = sum(t.nbytes for t in model.model.router.state_dict().values())
    assert sum(sizes) == 4 * body + routers
    assert ("model.lm_head.weight" in names) == (not tied)


@pytest.mark.parametrize("kv_sharing", KV_SHARING)
@pytest.mark.parametrize("router", ROUTERS)
def test_copies_and_casts_keep_what_is_shared(router: str, kv_sharing: str) -> None:
    model = make_model(small_config(router, kv_sharing, num_recursion_layers=2))
    size, wanted = unique_bytes(model), logits(model)
    for other in (copy.deepcopy(model), MoRForCausalLM(model.config).eval()):
        other.load_state_dict(model.state_dict())
        assert unique_bytes(other) == size
        check_tied(other)
        assert torch.equal(logits(other), wanted)
    wide = copy.deepcopy(model).to(torch.float64)
    check_tied(wide)
    assert unique_bytes(wide) == 2 * size
    assert_close(logits(wide).float(), wanted, atol=1e-4, rtol=1e-4)
    narrow = copy.deepcopy(model).to(torch.bfloat16)
    check_tied(narrow)
    routers = unique_bytes_of_router(model)
    assert unique_bytes(narrow) == (size - routers) // 2 + routers
    # One step of training moves what is shared together, and only once.
    wide.train()
    wide(random_ids(0, 2, 9), labels=random_ids(0, 2, 9)).loss.backward()
    torch.optim.SGD(wide.parameters(), 0.1).step()
    check_tied(wide)
    assert len(list(wide.parameters())) == len({id(p) for p in wide.parameters()})


def unique_bytes_of_router(model: MoRForCausalLM) -> int:
    return sum(t.nbytes for t in model.model.router.state_dict().values())


@pytest.mark.parametrize("router", [r for r in ROUTERS if r not in ("fixed", "random")])
@pytest.mark.parametrize("how", ["dtype", "config", "file"])
def test_loading_in_bfloat16_keeps_the_router_exact(tmp_path: Path, router: str, how: str) -> None:
    fields = {"router_objective": "aux_router"} if router == "expert_choice" else {}
    model = make_model(small_config(router, **fields))
    options = {}
    if how == "dtype":
        options = {"dtype": torch.bfloat16}
    elif how == "file":  # saved narrow, loaded as it was saved
        model = model.to(torch.bfloat16)
        options = {"dtype": "auto"}
    else:
        model.config.dtype = torch.bfloat16
    model.save_pretrained(tmp_path)
    if how == "config":
        written = json.loads((tmp_path / "config.json").read_text()) | {"dtype": "bfloat16"}
        (tmp_path / "config.json").write_text(json.dumps(written))
        options = {"dtype": "auto"}
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, **options)
    for name, value in loaded.model.router.state_dict().items():
        assert value.dtype == torch.float32, name
        assert torch.equal(value, model.model.router.state_dict()[name]), name
    body = [p for name, p in loaded.named_parameters() if ".router." not in name]
    assert {p.dtype for p in body} == {torch.bfloat16}
    out = logits(loaded)
    assert out.dtype == torch.bfloat16
    assert out.isfinite().all()


def test_what_the_router_remembers_survives(tmp_path: Path) -> None:
    model = make_model(small_config("threshold"))
    remembered = model.model.router.boundary.tolist()
    assert remembered[1] != 0
    assert remembered[2] != 0
    assert model.model.router.boundary_steps.tolist() == [0, 3, 3]
    model.save_pretrained(tmp_path / "threshold")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "threshold")
    assert loaded.model.router.boundary.tolist() == remembered
    assert loaded.model.router.boundary_steps.tolist() == [0, 3, 3]
    model = make_model(small_config("token_choice", router_balancing="loss_free"))
    assert model.model.router.bias.any()
    model.save_pretrained(tmp_path / "token")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "token")
    assert torch.equal(loaded.model.router.bias, model.model.router.bias)


def test_a_new_model_starts_as_it_should() -> None:
    config = MoRConfig(
        hidden_size=64, num_recursions=3, router="threshold", initializer_range=0.02,
        router_activation="none", router_architecture="mlp", share_norms=False,
    )  # fmt: skip
    model = MoRForCausalLM(config)
    for name, value in model.state_dict().items():
        if "boundary" in name:
            continue
        if "norm" in name:
            assert (value == 1).all(), name
        else:
            assert float(value.std()) == pytest.approx(0.02, rel=0.15), name
            assert abs(float(value.mean())) < 0.003, name
    assert model.model.router.boundary.tolist() == [0.5] * 3
    assert model.model.router.boundary_steps.tolist() == [0] * 3
    half = MoRForCausalLM(MoRConfig(num_recursions=2, router="expert_choice"))
    assert half.model.router.boundary.tolist() == [0.0] * 2


@pytest.mark.parametrize("tied", [True, False])
def test_the_vocabulary_can_be_resized(tmp_path: Path, tied: bool) -> None:
    model = make_model(small_config("expert_choice", tie_word_embeddings=tied))
    before = logits(model)
    model.resize_token_embeddings(70)
    check_tied(model)
    assert model.config.vocab_size == model.model.config.vocab_size == 70
    assert_close(logits(model)[..., :61], before)
    with torch.no_grad():
        assert model(torch.full((1, 3), 69)).logits.shape == (1, 3, 70)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    check_tied(loaded)
    assert torch.equal(logits(loaded), logits(model))
    model.resize_token_embeddings(50)
    with pytest.raises(ValueError, match=r"token id 50; vocab_size=50 allows 0\.\.49"):
        model(torch.full((1, 3), 50))


def test_a_large_model_in_several_files(tmp_path: Path) -> None:
    model = make_model(small_config("expert_choice", num_recursion_layers=2))
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    check_tied(loaded)
    assert torch.equal(logits(loaded), logits(model))


@pytest.mark.parametrize("kept", [0.0, 0.3, 0.9, 0.999])
def test_a_file_cut_short_is_refused(tmp_path: Path, kept: float) -> None:
    make_model(small_config("expert_choice")).save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content))])
    with pytest.raises((SafetensorError, OSError, ValueError)):
        AutoModelForCausalLM.from_pretrained(tmp_path)
