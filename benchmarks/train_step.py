"""Time one training step of every family, router and KV mode side by side, in one run.

    python benchmarks/train_step.py                          # the table of the docs, eager
    python benchmarks/train_step.py --compile                # layers through torch.compile
    python benchmarks/train_step.py --memory --only "vanilla 12,expert_choice R2"
    python benchmarks/train_step.py --device cuda --dtype bfloat16 --preset 360m --seq-len 2048 \
        --batch 16 --compile --documents 512

Forward, loss, backward and AdamW. Without ``--preset``: hidden 256, 4/2 heads, FFN 768, vocabulary
4,096, sequence 512, batch 8; vanilla 11 layers, the others 1 + 3 x 3 + 1. Variants are interleaved
round by round, so that a busy machine hurts all alike; medians and quartiles are reported.

Before anything is timed, each variant's loss is compared with that of its plain form (all logits in
memory, layers not compiled) and its gradients are checked to be finite. FLOPs are those of the
timed steps as they were routed, from every token's depth. The quotient is time ratio over FLOPs
ratio: 1.0 means that every saved FLOP saved its time. The baseline is our vanilla model;
Transformers' Llama of the same shape runs beside it as its users run it.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from train_variants import LLAMA, build, variants

from mor import preset
from mor.disk import append_jsonl
from mor.model.flops import batch_flops, flops_per_token
from mor.provenance import provenance


def batch_of(args: argparse.Namespace, ours: bool) -> dict[str, torch.Tensor]:
    """Random ids, which are their own labels; documents of random lengths where asked for."""
    generator = torch.Generator().manual_seed(0)
    vocab = preset(args.preset, "vanilla").vocab_size if args.preset else args.vocab
    ids = torch.randint(vocab, (args.batch, args.seq_len), generator=generator)
    batch = {"input_ids": ids, "labels": ids}
    if args.documents and ours:
        ends = torch.rand(ids.shape, generator=generator) < 1 / args.documents
        batch["document_ids"] = ends.cumsum(1)
    return {name: tensor.to(args.device) for name, tensor in batch.items()}


class Variant:
    """One model with its optimiser, ready to be timed."""

    def __init__(self, name: str, args: argparse.Namespace) -> None:
        self.name, self.args = name, args
        self.model = build(name, args)
        self.ours = name != LLAMA
        self.batch = batch_of(args, self.ours)
        self.half = args.dtype == "bfloat16"
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=1e-3, betas=(0.9, 0.95), fused=True
        )
        self._flops: list[float] = []

    @property
    def flops(self) -> float:
        """Training FLOPs of a step: the mean over those that were timed."""
        return statistics.fmean(self._flops)

    def count(self, depths: torch.Tensor | None) -> None:
        """Note what a step cost as it was routed."""
        tokens = self.args.batch * self.args.seq_len
        if depths is None:
            vanilla = variants(self.args)["vanilla"]()
            one = flops_per_token(vanilla, self.args.seq_len)
        else:
            one = batch_flops(self.model.config, depths, self.batch.get("document_ids"))
        self._flops.append(one.training * tokens)

    def loss(self, **how: Any) -> Any:
        """One forward in training mode."""
        kind = torch.device(self.args.device).type
        with torch.autocast(kind, torch.bfloat16, enabled=self.half):
            return self.model(**self.batch, use_cache=False, **how)

    def check(self) -> None:
        """The loss of the plain form and finite gradients; or stop."""
        plain = self.loss()
        if self.ours:
            self.model.model.use_compiled_layers(self.args.compile)
        elif self.args.compile:
            self.model.compile()
        if self.ours:
            self.model.model.router.finish_step()  # the random router draws the same again
        fast = self.loss(**self.how)
        fast.loss.backward()
        grads = [p.grad for p in self.model.parameters() if p.grad is not None]
        finite = all(bool(grad.isfinite().all()) for grad in grads)
        gap = abs(float(plain.loss.detach()) - float(fast.loss.detach()))
        self.model.zero_grad()
        if not finite or not gap < (2e-2 if self.half else 1e-4):
            raise SystemExit(
                f"{self.name}: loss {gap:.2e} off its plain form, gradients finite: {finite}; "
                "nothing is timed"
            )

    @property
    def how(self) -> dict[str, Any]:
        """Ours never makes all logits."""
        return {"return_logits": False} if self.ours else {}

    def step(self) -> torch.Tensor | None:
        """One optimiser step, router bookkeeping included; the depths of its tokens."""
        output = self.loss(**self.how)
        output.loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.ours:
            self.model.model.router.finish_step()
        return getattr(output, "depths", None)


def clock(args: argparse.Namespace) -> float:
    """Seconds, once all that was asked of the device is done."""
    if torch.device(args.device).type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def time_all(names: list[str], args: argparse.Namespace) -> dict[str, list[float]]:
    """Seconds of every step of every variant, and a line per variant in the results."""
    made = []
    for name in names:
        made.append(Variant(name, args))
        made[-1].check()
        for _ in range(2):
            made[-1].step()
        print(f"{name}: checked and warm", flush=True)  # compiling takes most of a short lease
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(args.rounds):
        for variant in made:
            began = clock(args)
            depths = variant.step()
            seconds[variant.name].append(clock(args) - began)
            variant.count(depths)
    report(args, made, seconds)
    return seconds


def report(args: argparse.Namespace, made: list[Variant], seconds: dict[str, list[float]]) -> None:
    """Print the table and append one JSON line per variant."""
    base = statistics.median(seconds["vanilla"])
    base_flops = next(variant.flops for variant in made if variant.name == "vanilla")
    tokens = args.batch * args.seq_len
    columns = ("variant", "ms (median)", "quartiles", "tokens/s", "GFLOP/s", "time ratio")
    table = Table(*columns, "FLOPs ratio", "quotient")
    cuda = torch.device(args.device).type == "cuda"
    header = provenance(torch.cuda.get_device_name() if cuda else None)
    for variant in made:
        times = sorted(seconds[variant.name])
        median = statistics.median(times)
        low, high = times[len(times) // 4], times[-1 - len(times) // 4]
        ratio, flops_ratio = median / base, variant.flops / base_flops
        record = {
            "median_s": median,
            "quartiles_s": [low, high],
            "tokens_per_s": tokens / median,
            "flops_per_s": variant.flops / median,
            "time_ratio": ratio,
            "flops_ratio": flops_ratio,
            "quotient": ratio / flops_ratio,
        }
        if args.peak_flops:
            record["mfu"] = variant.flops / median / args.peak_flops
        table.add_row(
            variant.name,
            f"{median * 1e3:.0f}",
            f"{low * 1e3:.0f}-{high * 1e3:.0f}",
            f"{tokens / median:,.0f}",
            f"{variant.flops / median / 1e9:,.0f}",
            f"{ratio:.3f}",
            f"{flops_ratio:.3f}",
            f"{ratio / flops_ratio:.3f}",
        )
        append_jsonl(args.out, settings(args, variant.name, "train_step") | record | header)
    Console(width=120).print(table)
    Console(width=120).print(f"load average at the end: {os.getloadavg()[0]:.2f}")


def settings(args: argparse.Namespace, name: str, benchmark: str) -> dict[str, Any]:
    """The conditions of a record."""
    told = ("rounds", "threads", "batch", "seq_len", "vocab", "preset", "recursions", "documents")
    mode = "compiled" if args.compile else "eager"
    return (
        {"benchmark": benchmark, "variant": name}
        | {field: getattr(args, field) for field in told}
        | {"dtype": args.dtype, "device": args.device, "mode": mode}
    )


def memory(names: list[str], args: argparse.Namespace) -> None:
    """Peak memory of two steps of each variant, in a process of its own."""
    if args.child:
        import resource

        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        variant = Variant(names[0], args)
        for _ in range(2):
            variant.step()
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
        if torch.device(args.device).type == "cuda":
            peak = torch.cuda.max_memory_allocated()
        print(peak)
        return
    table, base = Table("variant", "peak MiB above an empty process", "ratio to the first"), 0
    for name in names:
        again = [sys.executable, *sys.argv, "--child", "--only", name]
        told = subprocess.run(again, stdout=subprocess.PIPE, text=True, check=True).stdout
        peak = int(told.split()[-1])
        base = base or peak
        table.add_row(name, f"{peak / 2**20:,.0f}", f"{peak / base:.3f}")
        record = settings(args, name, "train_step_memory") | {"peak_bytes": peak}
        append_jsonl(args.out, record | {"ratio": peak / base} | provenance())
    Console(width=120).print(table)


def main() -> None:
    """Check, time, print, record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--vocab", type=int, default=4096, help="where there is no preset")
    parser.add_argument("--preset", help="135m, 360m, ... instead of the small shape")
    parser.add_argument("--recursions", type=int, default=3)
    parser.add_argument(
        "--documents", type=int, default=0, help="mean tokens of a document; 0: one"
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--peak-flops", type=float, help="of the device, for MFU")
    parser.add_argument("--memory", action="store_true", help="peak memory instead of time")
    parser.add_argument("--only", default="", help="comma-separated variants")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=Path("runs/bench/train_step.jsonl"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    names = [*variants(args), LLAMA]
    names = [name for name in names if not name.endswith("32")] if not args.only else names
    if args.only:
        unknown = set(args.only.split(",")) - set(names)
        if unknown:
            parser.error(f"--only names {', '.join(sorted(unknown))}; known: {', '.join(names)}")
        names = [name for name in names if name in args.only.split(",")]
    if args.memory:
        memory(names, args)
        return
    if "vanilla" not in names:
        names.insert(0, "vanilla")
    time_all(names, args)


if __name__ == "__main__":
    main()
