"""The authors' checkpoints, converted: every family, router and option."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors import safe_open
from transformers import LlamaConfig, LlamaForCausalLM

from mor import MorError
from mor.hf.convert.convert import convert_authors
from tests.hf.checkpoints import (
    CYCLE,
    EXPERT,
    TOKEN,
    VANILLA,
    assign,
    convert,
    ends,
    golden,
    layer,
    load,
    put,
    write,
)


@pytest.mark.parametrize("name", [VANILLA, CYCLE, EXPERT, TOKEN])
def test_a_shared_tensor_is_written_once_and_the_head_not_at_all(name: str, tmp_path: Path) -> None:
    model = convert(tmp_path, *golden(name))
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        names = set(file.keys())
    layers = len(model.model.prelude_layers) + len(model.model.block) + len(model.model.coda_layers)
    assert len([n for n in names if n.endswith("q_proj.weight")]) == layers
    assert "model.lm_head.weight" not in names
    assert model.model.lm_head.weight is model.model.embed_tokens.weight
    assert names <= set(model.state_dict())


@pytest.mark.parametrize("ending", [".bin", ".pt"])
def test_bin_files_are_read_as_weights_only(ending: str, tmp_path: Path) -> None:
    weights, config = golden(EXPERT)
    _, run = write(tmp_path, weights, config)
    file = tmp_path / f"pytorch_model{ending}"
    torch.save({**weights, "step": 3}, file)
    if ending == ".bin":
        model = load(convert_authors(file, run, tmp_path / "out"))
        expected = weights["model.layers.2.mor_router.router.weight"].float()
        assert torch.equal(model.model.router.net.weight[1], expected)
    else:
        with pytest.raises(MorError, match=r"end in \.safetensors or \.bin"):
            convert_authors(file, run, tmp_path / "out")


def test_configuration_may_be_yaml_and_hf_config_may_lie_beside_the_weights(
    tmp_path: Path,
) -> None:
    weights, config = golden(TOKEN)
    write(tmp_path, weights, config)
    (tmp_path / "config.json").write_text(json.dumps(config.pop("hf_config")), "utf-8")
    text = yaml.safe_dump(config).replace("1.0e-05", "1e-5")
    assert "z_coeff: 1e-5" in text  # which YAML reads as text
    (tmp_path / "run.yaml").write_text(text, "utf-8")
    model = load(convert_authors(tmp_path, tmp_path / "run.yaml", tmp_path / "out"))
    assert model.config.router_z_loss_coef == 1e-5
    assert model.config.hidden_size == 64
    assert model.config.num_recursion_layers == 2


def test_a_plain_llama_config_is_enough_for_a_vanilla_run(tmp_path: Path) -> None:
    weights, config = golden(VANILLA)
    model = convert(tmp_path, weights, config["hf_config"])
    assert model.config.family == "vanilla"
    assert model.config.num_hidden_layers == 6


STACKS = [
    # unrolled layers said, R, sharing, ln_share, shared group of each layer that is there
    (6, 3, "cycle", True, [0, 1, 0, 1, 0, 1]),
    (6, 3, "cycle", False, [0, 1, 0, 1, 0, 1]),
    (6, 2, "sequence", False, [0, 0, 1, 1, 2, 2]),
    (8, 3, "middle_cycle", False, [0, 1, 2, 1, 2, 1, 2, 3]),
    (8, 3, "middle_sequence", True, [0, 1, 1, 1, 2, 2, 2, 3]),
    (8, 3, "middle_sequence", False, [0, 1, 1, 1, 2, 2, 2, 3]),
    (9, 3, "middle_cycle", True, [0, 1, 2, 1, 2, 1, 2, 3]),  # thinned to 8
    (7, 3, "cycle", True, [0, 1, 0, 1, 0, 1]),  # thinned to 6
]


@pytest.mark.parametrize(("layers", "recursions", "sharing", "ln_share", "groups"), STACKS)
def test_every_recursive_form_equals_the_unrolled_llama(
    layers: int, recursions: int, sharing: str, ln_share: bool, groups: list[int], tmp_path: Path
) -> None:
    weights, config = ends(), golden(VANILLA)[1]
    shared = [layer() for _ in range(max(groups) + 1)]
    for place, group in enumerate(groups):
        own = {n: t for n, t in layer().items() if "norm" in n and not ln_share}
        put(weights, f"model.layers.{place}", shared[group] | own)
    config["hf_config"]["num_hidden_layers"] = layers
    config["recursive"] |= {
        "enable": True,
        "num_recursion": recursions,
        "sharing": sharing,
        "ln_share": ln_share,
    }
    model = convert(tmp_path, weights, config)
    assert len(model.model.block) == len(set(groups)) - 2 * sharing.startswith("middle_")
    llama = LlamaForCausalLM(
        LlamaConfig(**config["hf_config"] | {"num_hidden_layers": len(groups)})
    ).eval()
    llama.load_state_dict(weights)
    ids = torch.randint(0, 97, (2, 13))
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, llama(ids).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("sharing", ["cycle", "sequence"])
def test_one_recursion_with_base_depth_is_a_plain_model(sharing: str, tmp_path: Path) -> None:
    weights, config = ends(), golden(VANILLA)[1]
    for place in range(2):
        put(weights, f"model.layers.{place}", layer())
    config["recursive"] |= {
        "enable": True,
        "num_recursion": 1,
        "base_depth": 2,
        "sharing": sharing,
    }
    model = convert(tmp_path, weights, config)
    assert model.config.family == "vanilla"
    last = model.model.block[1].self_attn.q_proj.weight
    assert torch.equal(last, weights["model.layers.1.self_attn.q_proj.weight"])


ROUTER_FILES = {
    "linear": [("weight", "router.weight", (1, 64))],
    "mlp": [("up", "router.0.weight", (128, 64)), ("weight", "router.2.weight", (1, 128))],
    "wide_mlp": [("up", "router.0.weight", (128, 64)), ("weight", "router.2.weight", (1, 128))],
}


@pytest.mark.parametrize("kind", list(ROUTER_FILES))
@pytest.mark.parametrize("sharing", ["cycle", "middle_cycle"])
def test_expert_choice_with_any_router_and_an_auxiliary_one(
    sharing: str, kind: str, tmp_path: Path
) -> None:
    weights, config = ends(), golden(EXPERT)[1]
    middle = sharing == "middle_cycle"
    block = [layer(), layer()]
    for r in range(3):
        for i, tensors in enumerate(block):
            put(weights, f"model.layers.{r + middle}.block.{i}", tensors)
        for module in ("mor_router", "mlp_router"):
            for _, name, shape in ROUTER_FILES[kind]:
                weights[f"model.layers.{r + middle}.{module}.{name}"] = torch.randn(shape)
    if middle:
        put(weights, "model.layers.0", layer())
        put(weights, "model.layers.4", layer())
    config["hf_config"]["num_hidden_layers"] = 6 + 2 * middle
    config["recursive"]["sharing"] = sharing
    config["mor"]["router_type"] = kind
    config["mor"]["expert"]["sampling"] = "aux_router"
    model = convert(tmp_path, weights, config)
    router = model.model.router
    for r in range(3):
        for ours, theirs in ((router.net, "mor_router"), (router.auxiliary, "mlp_router")):
            for mine, name, _ in ROUTER_FILES[kind]:
                expected = weights[f"model.layers.{r + middle}.{theirs}.{name}"]
                assert torch.equal(getattr(ours, mine)[r], expected)
    for i in range(2):
        expected = weights[f"model.layers.{1 + middle}.block.{i}.mlp.up_proj.weight"]
        assert torch.equal(model.model.block[i].mlp.up_proj.weight, expected)
    if middle:
        expected = weights["model.layers.4.mlp.up_proj.weight"]
        assert torch.equal(model.model.coda_layers[0].mlp.up_proj.weight, expected)
    assert router.boundary.tolist() == [0, 0, 0]
    output = model(torch.randint(0, 97, (2, 9)), routing="topk")
    assert output.depths.flatten().bincount().tolist() == [0, 6, 6, 6]


@pytest.mark.parametrize("kind", ["linear", "mlp"])
@pytest.mark.parametrize("balancing", ["loss", "loss_free", None])
def test_token_choice_with_any_router_and_balance(
    balancing: str | None, kind: str, tmp_path: Path
) -> None:
    weights, config = golden(TOKEN)
    config["mor"]["router_type"] = kind
    config["mor"]["token"]["balancing"] = balancing
    bias = torch.tensor([-9.0, 0.0, 9.0])
    weights["model.layers.1.router_bias"] = bias
    if kind == "mlp":
        del weights["model.layers.1.mor_router.router.weight"]
        weights["model.layers.1.mor_router.router.0.weight"] = torch.randn(128, 64)
        weights["model.layers.1.mor_router.router.2.weight"] = torch.randn(3, 128)
    model = convert(tmp_path, weights, config)
    assert model.config.router_balancing == (balancing or "none")
    # Without loss-free balancing their code never adds the bias.
    used = bias if balancing == "loss_free" else torch.zeros(3)
    assert torch.equal(model.model.router.bias, used)
    if kind == "mlp":
        expected = weights["model.layers.1.mor_router.router.2.weight"]
        assert torch.equal(model.model.router.net.weight[0], expected)
    depths = model(torch.randint(0, 97, (2, 9))).depths
    assert bool((depths == 3).all()) == (balancing == "loss_free")


def test_random_router_leaves_its_unused_weights_behind(tmp_path: Path) -> None:
    weights, config = golden(EXPERT)
    config["mor"]["rand_router"] = True
    model = convert(tmp_path, weights, config)
    assert model.config.router == "random"
    assert model.config.router_alpha == 0.1
    assert not list(model.model.router.parameters())


# (section and field of theirs) -> (value there, field of ours, value here)
EXPERT_OPTIONS: list[tuple[str, Any, str, Any]] = [
    ("mor.capacity", None, "router_capacities", pytest.approx([1, 2 / 3, 1 / 3])),
    ("mor.capacity", "0.9, 0.5,0.25", "router_capacities", [0.9, 0.5, 0.25]),
    ("mor.temp", 2.0, "router_temperature", 2.0),
    ("mor.temp", None, "router_temperature", 1.0),
    ("mor.z_loss", True, "router_z_loss_coef", 0.001),
    ("mor.z_loss", False, "router_z_loss_coef", 0.0),
    ("mor.expert.alpha", 0.3, "router_alpha", 0.3),
    ("mor.expert.router_func", "tanh", "router_activation", "tanh"),
    ("mor.expert.router_func", None, "router_activation", "none"),
    ("mor.expert.sampling", None, "router_objective", "none"),
    ("mor.expert.coeff", 0.5, "router_aux_loss_coef", 0.5),
    ("mor.expert.coeff", None, "router_aux_loss_coef", 0.01),
    ("mor.expert.gating", "weighted", "update_rule", "gated"),
    ("mor.expert.gating", "additive", "update_rule", "additive"),
    ("mor.expert.cap_warmup_step", 40, "router_capacity_warmup_steps", 40),
    ("mor.expert.cap_warmup_step", None, "router_capacity_warmup_steps", 86),
    ("kv_sharing.enable", True, "kv_sharing", "recursive"),
    ("kv_sharing.update_cache", True, "kv_sharing", "none"),
    ("hf_config.rope_theta", 5e5, "rope_parameters", {"rope_type": "default", "rope_theta": 5e5}),
]
TOKEN_OPTIONS: list[tuple[str, Any, str, Any]] = [
    ("mor.token.router_func", "sigmoid", "router_activation", "sigmoid"),
    ("mor.token.alpha", 0.5, "router_alpha", 0.5),
    ("mor.token.coeff", None, "router_balancing_loss_coef", 0.01),
    ("mor.token.u", 0.01, "router_bias_update_rate", 0.01),
    ("mor.token.gating", "none", "update_rule", "additive"),
    ("mor.token.bal_warmup_step", 7, "router_balance_warmup_steps", 7),
]


@pytest.mark.parametrize(
    ("name", "path", "value", "field", "ours"),
    [(EXPERT, *option) for option in EXPERT_OPTIONS]
    + [(TOKEN, *option) for option in TOKEN_OPTIONS],
)
def test_every_option_is_carried_over(
    name: str, path: str, value: Any, field: str, ours: Any, tmp_path: Path
) -> None:
    weights, config = golden(name)
    config["num_warmup_steps"] = 86
    config["mor"]["z_coeff"] = 0.001
    assign(config, path, value)
    assert getattr(convert(tmp_path, weights, config).config, field) == ours


def test_kv_sharing_with_update(tmp_path: Path) -> None:
    weights, config = golden(EXPERT)
    config["kv_sharing"] = {"enable": True, "update_cache": True}
    assert convert(tmp_path, weights, config).config.kv_sharing == "recursive_update"


def test_float16_is_widened_and_bfloat16_stays_with_routers_in_float32(tmp_path: Path) -> None:
    weights, config = golden(EXPERT)
    assert weights["model.norm.weight"].dtype == torch.float16
    assert {p.dtype for p in convert(tmp_path, weights, config).parameters()} == {torch.float32}
    half = {n: t.bfloat16() for n, t in weights.items()}
    sources = write(tmp_path / "half", half, config)
    model = load(convert_authors(*sources, tmp_path / "out-half"))
    for name, parameter in model.named_parameters():
        router = name.startswith("model.router")
        assert parameter.dtype == (torch.float32 if router else torch.bfloat16)


def test_a_recursive_head_that_was_never_tied_is_kept(tmp_path: Path) -> None:
    weights, config = golden(CYCLE)
    weights["lm_head.weight"] = torch.randn(97, 64)
    with pytest.warns(UserWarning, match="both are kept, untied"):
        model = convert(tmp_path, weights, config)
    assert not model.config.tie_word_embeddings
    assert torch.equal(model.model.lm_head.weight, weights["lm_head.weight"])


def test_a_tied_head_may_be_left_out(tmp_path: Path) -> None:
    weights, config = golden(EXPERT)
    del weights["lm_head.weight"]
    model = convert(tmp_path, weights, config)
    assert model.model.lm_head.weight is model.model.embed_tokens.weight
