"""Vanilla against R = 3 on one GPU, over sizes of the model and numbers of clients.

    python benchmarks/gpu/sizes.py                        # bfloat16, 360M and 7B, 1.5 minutes
    python benchmarks/gpu/sizes.py --device cpu           # the same steps at a toy size

A pass over few tokens costs a GPU the time to read the weights, or to start the kernels; the host
prepares each tick meanwhile. Which of them is longest decides what routing gains, so both are
told: the mean tick of the faster run, and the kernels of one (CUDA's profiler). Random weights and
forced exits (:mod:`mor.bench.forced`), requests of one prompt token, answers of 64 tokens in the
mean, greedy. Both systems run the same engine. Lines are appended to
``runs/bench/gpu_sizes.jsonl``.
"""

from __future__ import annotations

import argparse
import gc
import json
from pathlib import Path
from typing import Any

import torch
from layers import kernel_ms, measure  # beside this file

from mor.bench.device import parse_device
from mor.bench.forced import bench_config, bench_model
from mor.bench.systems import EngineSystem
from mor.bench.workload import Lengths, make_workload
from mor.config import MoRConfig
from mor.disk import append_jsonl
from mor.provenance import provenance

OUT = Path(__file__).parents[2] / "runs/bench/gpu_sizes.jsonl"
CLIENTS = {"360m": (64, 256), "7b": (16, 32, 64), "tiny": (4,)}
RECURSIONS = (1, 3)


def config_of(shape: str, recursions: int) -> MoRConfig:
    """A preset's configuration; `7b` has the widths of Llama 2 7B with 8 heads of keys."""
    family = "vanilla" if recursions == 1 else "mor"
    if shape != "7b":
        return bench_config(shape, recursions, None, family)
    base = bench_config("1.7b", recursions, 32, family)
    widths = {
        "hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32,
        "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 32000,
    }  # fmt: skip
    return MoRConfig(**base.to_dict() | widths)


def run(shape: str, recursions: int, device: torch.device, requests: int) -> None:
    """Time one system with every number of clients."""
    cuda = device.type == "cuda"
    config = config_of(shape, recursions)
    model = bench_model(config, 0, device=device)
    options: dict[str, Any] = {} if cuda else {"static_stages": True, "attention": "plain"}
    name = "vanilla" if recursions == 1 else f"mor{recursions}"
    system = EngineSystem(name, model, forced=recursions > 1, options=options)
    if cuda:
        system.cast(torch.bfloat16)
    for clients in CLIENTS[shape]:
        work = make_workload(
            "paper", clients * requests, clients, config.vocab_size,
            Lengths(scale=0.25 if cuda else 0.03), pass_tokens=clients,
        )  # fmt: skip
        rates, counters = measure(system, work, cuda)
        line = {
            "benchmark": "gpu_sizes", "system": name, "shape": shape, "device": str(device),
            "parameters": sum(weight.numel() for weight in model.parameters()),
            "layers": config.num_hidden_layers, "clients": clients, "requests": len(work.asks),
            "new_tokens": work.output_tokens, "tokens_per_s": rates,
            "ticks": counters["ticks"], "tokens_per_tick": counters["tokens_per_tick"],
            "ms_per_tick": 1e3 * work.output_tokens / max(rates) / counters["ticks"],
        }  # fmt: skip
        if cuda:
            line["kernel_ms_per_tick"] = kernel_ms(system, work) / counters["ticks"]
        print(json.dumps(line), flush=True)
        append_jsonl(OUT, line | provenance(torch.cuda.get_device_name() if cuda else None))
    system.close()


def main() -> None:
    """Time both systems at every size."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--shapes", nargs="+", choices=CLIENTS, help="default: 360m 7b")
    parser.add_argument("--requests", type=int, default=2, help="of each client, in turn")
    args = parser.parse_args()
    device = parse_device(args.device)
    for shape in args.shapes or (("360m", "7b") if device.type == "cuda" else ("tiny",)):
        for recursions in RECURSIONS:
            run(shape, recursions, device, args.requests)
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
