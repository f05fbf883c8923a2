"""What the host does for each token where a device runs the stages, timed without a device.

    python benchmarks/host_time.py                   # vanilla and R = 3, 64 and 256 clients
    python benchmarks/host_time.py --collect         # the collector walks over all that was loaded

With static stages the host prepares columns, starts a stage and reads its answers a tick late
(docs/engine.md). Here each stage gives the answers of its first run again (the router's by chance:
half of the tokens go on), so that all other time is the host's: scheduling, pages, columns, the
sampler's bookkeeping, telling each new token. Seconds are of the thread (a shared machine disturbs
them less than the clock). Requests of one prompt token, answers of 64 tokens in the mean, every
token told. As in ``mor serve``, Python's collector leaves alone what was there before the requests.
Lines are appended to ``runs/bench/host_time.jsonl``.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

import mor.engine.stages as stages
from mor.bench.forced import bench_config, bench_model
from mor.bench.systems import EngineSystem
from mor.bench.workload import Lengths, make_workload
from mor.disk import append_jsonl
from mor.ops.replay import Function
from mor.provenance import provenance

OUT = Path(__file__).parents[1] / "runs/bench/host_time.jsonl"


class First:
    """A stage that gives what its first run gave; of yes and no, each by chance."""

    def __init__(self, function: Function) -> None:
        self.found = tuple(found.clone() for found in function())
        for found in self.found:
            if found.dtype == torch.bool:
                found.copy_(torch.rand(found.shape) < 0.5)

    def __call__(self) -> tuple[Tensor, ...]:
        """The same again."""
        return self.found


def measure(recursions: int, clients: int, rounds: int, frozen: bool) -> dict[str, object]:
    """The line of one system and number of clients."""
    torch.manual_seed(0)  # the same tokens go on, whoever is measured
    config = bench_config("tiny", recursions)
    model = bench_model(config)
    options = {"static_stages": True, "attention": "plain"}
    system = EngineSystem("host", model, forced=recursions > 1, options=options)
    work = make_workload(
        "paper", 2 * clients, clients, config.vocab_size, Lengths(scale=0.25), pass_tokens=clients
    )
    system.run(work)
    if frozen:
        gc.freeze()
    spans = []
    for _ in range(rounds):
        gc.collect()
        began = time.thread_time()
        counters = system.run(work).counters
        spans.append(time.thread_time() - began)
    gc.unfreeze()
    per_token = [1e6 * span / work.output_tokens for span in spans]
    return {
        "benchmark": "host_time", "recursions": recursions, "clients": clients,
        "new_tokens": work.output_tokens, "ticks": counters["ticks"], "frozen": frozen,
        "tokens_per_tick": counters["tokens_per_tick"],
        "us_per_token": statistics.median(per_token), "range_us": [min(per_token), max(per_token)],
        "ms_per_tick": 1e3 * statistics.median(spans) / counters["ticks"], "rounds": rounds,
    }  # fmt: skip


def main() -> None:
    """Time all of them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--clients", type=int, nargs="+", default=[64, 256])
    parser.add_argument("--recursions", type=int, nargs="+", default=[1, 3])
    parser.add_argument("--collect", action="store_true", help="do not freeze what is loaded")
    args = parser.parse_args()
    torch.set_num_threads(1)
    plain: Callable[..., object] = stages.record
    for recursions in args.recursions:
        for clients in args.clients:
            stages.record = lambda function, device: First(function)  # type: ignore[assignment]
            try:
                line = measure(recursions, clients, args.rounds, not args.collect)
            finally:
                stages.record = plain  # type: ignore[assignment]
            print(json.dumps(line), flush=True)
            append_jsonl(OUT, line | provenance(None))


if __name__ == "__main__":
    main()
