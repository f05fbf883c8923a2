"""Count what one training step sends between ranks: DDP, FSDP2 gathered once, gathered per pass.

    python benchmarks/wire_bytes.py                    # the paper's 135M shape, two gloo processes
    python benchmarks/wire_bytes.py --preset 360m      # about 6 GB of memory for each process
    python benchmarks/wire_bytes.py --ranks 4

Every collective of one step (forward, backward; the optimiser sends nothing) is counted as torch is
asked for it, with its payload: the whole of the gathered, scattered or reduced tensor. These are
counts, not timings: they are the same on any machine and for any sequence length. What crosses the
network follows from the payload S and N ranks: with the ring algorithm each rank receives
(N - 1) / N x S for an all-gather or a reduce-scatter, twice that for an all-reduce. Beside it
stands what the formula gives: parameters of every unit times how often it is gathered or reduced.
"""

# No `from __future__ import annotations`: DDP looks at the types of its hook.

import argparse
import gc
import os
import signal
import tempfile
import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

from mor import MoRConfig, MoRForCausalLM, preset
from mor.disk import append_jsonl
from mor.provenance import provenance
from mor.train.distributed import release, shard

VARIANTS: dict[str, dict[str, Any]] = {
    "vanilla": {"family": "vanilla"},
    "expert_choice, R = 3": {"family": "mor", "num_recursions": 3},
    "threshold, R = 3": {"family": "mor", "num_recursions": 3, "router": "threshold"},
}
MODES = ("ddp", "fsdp, gathered once", "fsdp, gathered per pass")


class Counts:
    """Calls and payload bytes by kind."""

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()
        self.off = False

    def add(self, kind: str, tensor: torch.Tensor) -> None:
        """Note one collective over ``tensor``."""
        self.calls[kind] += 1
        self.bytes[kind] += tensor.nbytes

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Count what goes through torch.distributed; torch 2.13 renamed what FSDP2 calls."""
        kinds = (
            ("all_gather_into_tensor", "all_gather", "output_tensor", 0),
            ("all_gather_single", "all_gather", "output_tensor", 0),
            ("reduce_scatter_tensor", "reduce_scatter", "input", 1),
            ("reduce_scatter_single", "reduce_scatter", "input", 1),
            ("all_reduce", "router", "tensor", 0),
        )
        before = {name: getattr(dist, name) for name, *_ in kinds if hasattr(dist, name)}
        for name, kind, keyword, position in kinds:
            if name in before:
                setattr(dist, name, self._counted(before[name], kind, keyword, position))
        try:
            yield
        finally:
            for name, function in before.items():
                setattr(dist, name, function)

    def _counted(self, inner: Any, kind: str, keyword: str, position: int) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            if not self.off:
                self.add(kind, kwargs[keyword] if keyword in kwargs else args[position])
            return inner(*args, **kwargs)

        return call

    def hook(self, group: Any, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        """DDP's own all-reduce, counted."""
        self.add("all_reduce", bucket.buffer())
        self.off = True
        try:
            return allreduce_hook(group, bucket)
        finally:
            self.off = False


def padded(module: nn.Module, ranks: int, without: set[int]) -> int:
    """Bytes of a unit in float32; FSDP2 cuts dimension 0 into equal parts and pads the last."""
    total = 0
    for parameter in module.parameters():
        if id(parameter) not in without:
            without.add(id(parameter))
            rows = -(-parameter.shape[0] // ranks) * ranks
            total += rows * (parameter.numel() // parameter.shape[0]) * 4
    return total


def expected(model: MoRForCausalLM, mode: str, ranks: int) -> dict[str, int]:
    """Payload bytes that the formula gives."""
    if mode == "ddp":
        return {"all_reduce": sum(p.numel() * 4 for p in model.parameters())}
    inner, taken = model.model, set[int]()
    private = sum(padded(x, ranks, taken) for x in (*inner.prelude_layers, *inner.coda_layers))
    block = sum(padded(x, ranks, taken) for x in inner.block)
    root = padded(model, ranks, taken)
    once = mode == "fsdp, gathered once"
    uses = 1 if once else 2 * model.config.num_recursions
    gathered = root + (1 if once else 2) * private + uses * block
    return {"all_gather": gathered, "reduce_scatter": root + private + block}


def measure(args: argparse.Namespace, variant: str, mode: str) -> dict[str, Any]:
    """One step on this rank."""
    fields = dict(VARIANTS[variant])
    config: MoRConfig = preset(args.preset, fields.pop("family"), **fields)
    torch.manual_seed(0)
    model: Any = MoRForCausalLM(config).train()
    formula = expected(model, mode, args.ranks)
    parameters = sum(p.numel() for p in model.parameters())
    counts = Counts()
    network = model
    if mode == "ddp":
        network = DistributedDataParallel(model)
        network.register_comm_hook(None, counts.hook)
    else:
        shard(model, torch.device("cpu"), regather="per pass" in mode)
    torch.manual_seed(dist.get_rank())
    ids = torch.randint(0, config.vocab_size, (args.batch, args.seq_len))
    with counts.watching():
        network(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    if mode != "ddp":
        release(model)
    moved = {k: v for k, v in counts.bytes.items() if k != "router"}
    weight = {"all_gather": 1, "reduce_scatter": 1, "all_reduce": 2}
    received = sum(weight[k] * v for k, v in moved.items()) * (args.ranks - 1) / args.ranks
    return {
        "benchmark": "wire_bytes",
        "variant": variant,
        "mode": mode,
        "preset": args.preset,
        "ranks": args.ranks,
        "parameters": parameters,
        "calls": dict(counts.calls),
        "payload_bytes": dict(counts.bytes),
        "formula_bytes": formula,
        "received_per_rank_ring_bytes": received,
        "dtype": "float32",
        "micro_batches": 1,
    }


def work(args: argparse.Namespace, rank: int, meet: str) -> None:
    """All variants and modes on one rank."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meet}", rank=rank, world_size=args.ranks)
    header, records = provenance(), []
    for variant in VARIANTS:
        for mode in MODES:
            records.append(measure(args, variant, mode))
            gc.collect()  # wrapped models hold themselves in circles
            if rank == 0:
                append_jsonl(args.out, records[-1] | header)
    if rank == 0:
        show(records)
    dist.destroy_process_group()


def show(records: list[dict[str, Any]]) -> None:
    """Print the table."""
    table = Table(
        "model",
        "mode",
        "gathers",
        "gathered MB",
        "reduced MB",
        "formula MB",
        "router kB",
        "ring MB",
    )
    for one in records:
        calls, moved = one["calls"], one["payload_bytes"]
        reduced = moved.get("reduce_scatter", 0) + moved.get("all_reduce", 0)
        table.add_row(
            one["variant"],
            one["mode"],
            str(calls.get("all_gather", 0)),
            f"{moved.get('all_gather', 0) / 1e6:,.1f}",
            f"{reduced / 1e6:,.1f}",
            " + ".join(f"{v / 1e6:,.1f}" for v in one["formula_bytes"].values()),
            f"{moved.get('router', 0) / 1e3:,.1f}",
            f"{one['received_per_rank_ring_bytes'] / 1e6:,.1f}",
        )
    Console(width=130).print(table)


def main() -> None:
    """Fork the ranks and wait."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="135m")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--seq-len", type=int, default=16)
    parser.add_argument("--out", type=Path, default=Path("runs/bench/wire_bytes.jsonl"))
    args = parser.parse_args()
    children = []
    with tempfile.TemporaryDirectory() as folder:
        for rank in range(args.ranks):
            pid = os.fork()
            if pid == 0:
                try:
                    work(args, rank, f"{folder}/meet")
                except BaseException:
                    traceback.print_exc()
                    os._exit(1)
                os._exit(0)
            children.append(pid)
        for _ in range(args.ranks):
            pid, status = os.wait()
            children.remove(pid)
            if status:
                for other in children:
                    os.kill(other, signal.SIGKILL)
                raise SystemExit("a rank failed")


if __name__ == "__main__":
    main()
