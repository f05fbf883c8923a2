"""Checkpoints to convert: the reference models, free to change, and random layers."""

from __future__ import annotations

import copy
import json
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from mor import MoRForCausalLM
from mor.hf.convert.convert import convert_authors

GOLDEN = Path(__file__).parents[1] / "golden"
VANILLA, CYCLE = "vanilla_6l", "recursive_cycle_r3"
EXPERT, TOKEN = "mor_expert_mc_r3", "mor_token_mc_r3_softmax_balloss"
SECTIONS = ("hf_config", "recursive", "kv_sharing", "mor")
RECORDED = ("logits", "labels", "input_ids", "hidden", "router_logits", "selected", "gate", "grad")
LAYER = {
    "self_attn.q_proj": (64, 64),
    "self_attn.k_proj": (32, 64),
    "self_attn.v_proj": (32, 64),
    "self_attn.o_proj": (64, 64),
    "mlp.gate_proj": (128, 64),
    "mlp.up_proj": (128, 64),
    "mlp.down_proj": (64, 128),
    "input_layernorm": (64,),
    "post_attention_layernorm": (64,),
}


@cache
def _golden(name: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    tensors = load_file(GOLDEN / f"{name}.safetensors")
    facts = json.loads((GOLDEN / f"{name}.json").read_text("utf-8"))
    weights = {n: t for n, t in tensors.items() if not n.startswith(RECORDED)}
    return weights, {section: facts[section] for section in SECTIONS}


def golden(name: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Weights and configuration of a reference model, free to change."""
    weights, config = _golden(name)
    return dict(weights), copy.deepcopy(config)


def write(folder: Path, weights: dict[str, Tensor], config: dict[str, Any]) -> tuple[Path, Path]:
    folder.mkdir(exist_ok=True)
    save_file({n: t.contiguous() for n, t in weights.items()}, folder / "model.safetensors")
    (folder / "run.json").write_text(json.dumps(config), "utf-8")
    return folder / "model.safetensors", folder / "run.json"


def load(folder: Path) -> MoRForCausalLM:
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def convert(tmp_path: Path, weights: dict[str, Tensor], config: dict[str, Any]) -> MoRForCausalLM:
    return load(convert_authors(*write(tmp_path / "in", weights, config), tmp_path / "out"))


def layer(scale: float = 0.05) -> dict[str, Tensor]:
    """Random tensors of one layer of the reference shape."""
    made = {}
    for name, shape in LAYER.items():
        noise = torch.randn(shape)
        made[f"{name}.weight"] = 1 + 0.2 * noise if "norm" in name else scale * noise
    return made


def put(weights: dict[str, Tensor], prefix: str, tensors: dict[str, Tensor]) -> None:
    weights |= {f"{prefix}.{name}": t.clone() for name, t in tensors.items()}


def ends() -> dict[str, Tensor]:
    embedding = 0.5 * torch.randn(97, 64)
    return {
        "model.embed_tokens.weight": embedding,
        "model.norm.weight": 1 + 0.2 * torch.randn(64),
        "lm_head.weight": embedding.clone(),
    }


def assign(config: dict[str, Any], path: str, value: Any) -> None:
    *parents, last = path.split(".")
    for parent in parents:
        config = config[parent]
    config[last] = value
