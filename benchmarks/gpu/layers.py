"""Fused layers against plain ones: speed of the engine and time of its kernels.

    python benchmarks/gpu/layers.py                 # 360M in bfloat16 on the GPU, 1.5 minutes
    python benchmarks/gpu/layers.py --device cpu    # the same steps at a toy size, to try it out

First the engine is held to ``model.generate``, in float32 on the device, over some routers and KV
modes. Then vanilla and R = 3 with random weights and forced exits answer requests of one prompt
token. Results are appended to ``runs/bench/gpu_layers.jsonl``.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import serving  # beside this file
import torch
from torch.profiler import ProfilerActivity, profile

import mor.engine.parts
from mor.bench.checks import Checks
from mor.bench.device import parse_device
from mor.bench.forced import bench_config, bench_model
from mor.bench.systems import EngineSystem
from mor.bench.workload import Lengths, Workload, make_workload
from mor.disk import append_jsonl
from mor.provenance import provenance

OUT = Path(__file__).parents[2] / "runs/bench/gpu_layers.jsonl"
CASES = (
    ("threshold", "none"), ("threshold", "recursive_update"), ("expert_choice", "recursive"),
    ("threshold", "propagate"), ("token_choice", "none"), ("fixed", "recursive"),
)  # fmt: skip


def measure(
    system: EngineSystem, work: Workload, cuda: bool
) -> tuple[list[float], Mapping[str, float]]:
    """New tokens per second of two runs, after one that captures graphs; counters of a run."""
    rates = []
    for _ in range(3):
        began = time.perf_counter()
        counters = system.run(work).counters
        if cuda:
            torch.cuda.synchronize()
        rates.append(work.output_tokens / (time.perf_counter() - began))
    return rates[1:], counters


def kernel_ms(system: EngineSystem, work: Workload) -> float:
    """Milliseconds of all kernels of a run, after :func:`measure`."""
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as found:
        system.run(work)
    total: float = sum(event.self_device_time_total for event in found.key_averages()) / 1e3
    return total


def main() -> None:
    """Check, then time."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    args = parser.parse_args()
    device = parse_device(args.device)
    cuda = device.type == "cuda"
    torch.backends.cuda.matmul.allow_tf32 = False
    checks = Checks()
    for router, kv in CASES:
        checks.run(f"engine, {router}, KV {kv}", serving.check_engine, device, True, router, kv)
    checks.finish()
    sizes = ((64, 64), (256, 128)) if cuda else ((4, 4),)
    shape, vocabulary, scale = ("360m", 49152, 0.25) if cuda else ("tiny", 320, 0.03)
    own = mor.engine.parts.fused_view
    for recursions, fused in ((1, False), (1, True), (3, False), (3, True)):
        mor.engine.parts.fused_view = own if fused else (lambda model: model)
        family = "vanilla" if recursions == 1 else "mor"
        model = bench_model(bench_config(shape, recursions, None, family), 0)
        options: dict[str, Any] = {} if cuda else {"static_stages": True, "attention": "plain"}
        name = "vanilla" if recursions == 1 else f"mor{recursions}"
        system = EngineSystem(name, model.to(device), forced=recursions > 1, options=options)
        if cuda:
            system.cast(torch.bfloat16)
        for clients, width in sizes:
            work = make_workload(
                "paper", max(clients, 128 if cuda else 1), clients, vocabulary,
                Lengths(scale=scale), pass_tokens=width,
            )  # fmt: skip
            line = {
                "benchmark": "gpu_layers", "system": name, "shape": shape, "device": args.device,
                "layers": "fused" if fused else "plain", "clients": clients, "pass_tokens": width,
                "requests": len(work.asks), "new_tokens": work.output_tokens,
                "tokens_per_s": measure(system, work, cuda)[0],
            }  # fmt: skip
            if cuda:
                line["kernel_ms"] = kernel_ms(system, work)
            print(json.dumps(line), flush=True)
            if cuda:
                append_jsonl(OUT, line | provenance(torch.cuda.get_device_name()))


if __name__ == "__main__":
    main()
