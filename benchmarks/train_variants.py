"""The models that `train_step.py` times: families, routers, KV modes, Transformers' Llama."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from mor import MoRConfig, MoRForCausalLM, preset

WIDTHS = {
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
LLAMA = "transformers llama"
KV = {"": "none", " kv": "recursive", " kv update": "recursive_update"}


def variants(args: argparse.Namespace) -> dict[str, Any]:
    """Every model that can be timed, by name, as a function that makes its configuration."""
    recursions = args.recursions

    def small(**fields: Any) -> Callable[[], MoRConfig]:
        return lambda: MoRConfig(**WIDTHS, vocab_size=args.vocab, **fields)

    def shaped(family: str, **fields: Any) -> Callable[[], MoRConfig]:
        room = {"max_position_embeddings": max(2048, args.seq_len)}
        depth = {} if family == "vanilla" else {"num_recursions": recursions}
        return lambda: preset(args.preset, family, **depth, **room, **fields)

    block = {"num_recursions": recursions, "num_recursion_layers": 9 // recursions}
    made: dict[str, Any] = {
        "vanilla": shaped("vanilla") if args.preset else small(num_hidden_layers=11)
    }
    for suffix, kv in KV.items():
        for router in ("fixed", "expert_choice", "threshold", "token_choice", "random"):
            if router in ("fixed", "random") and kv == "recursive_update":
                continue  # the first is no sharing at all, the second is expert_choice's
            name = ("recursive" if router == "fixed" else router) + suffix
            if args.preset:
                family = "recursive" if router == "fixed" else "mor"
                routed = {} if router == "fixed" else {"router": router}
                made[name] = shaped(family, kv_sharing=kv, **routed)
            else:
                made[name] = small(**block, router=router, kv_sharing=kv)
    if not args.preset:  # equal depth at R = 2, for memory
        made["vanilla 32"] = small(num_hidden_layers=32)
        made["expert_choice R2 32"] = small(
            num_hidden_layers=32, num_recursions=2, router="expert_choice"
        )
    return made


def build(name: str, args: argparse.Namespace) -> torch.nn.Module:
    """A model in training mode, on its device."""
    torch.manual_seed(0)
    made = variants(args)
    if name == LLAMA:
        ours = made["vanilla"]()
        shape = {field: getattr(ours, field) for field in (*WIDTHS, "vocab_size", "head_dim")}
        config = LlamaConfig(
            **shape,
            num_hidden_layers=ours.num_hidden_layers,
            max_position_embeddings=ours.max_position_embeddings,
            tie_word_embeddings=True,
        )
        return LlamaForCausalLM(config).to(args.device).train()
    return MoRForCausalLM(made[name]()).to(args.device).train()
