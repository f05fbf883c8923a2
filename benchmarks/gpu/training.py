"""All that training needs checked and timed on a GPU, in one command.

    python benchmarks/gpu/training.py                 # on the GPU at hand, at most 9 minutes
    python benchmarks/gpu/training.py --device cpu    # the same steps at a toy size, to try it out

1. Correctness: each attention form and the loss on the device, forward and backward, against one
   dense mask in float32 on the CPU, also where the host knows no lengths; then one training step of
   every router and KV mode on the device against the same step on the CPU. Nothing is timed when
   one of them fails.
2. Time: ``train_step.py`` for the 135M and 360M presets at sequence 2,048 in bfloat16, compiled,
   with and without document masks, every router and KV mode interleaved with vanilla and
   Transformers' Llama; MFU beside each.
3. Memory: R = 2 against vanilla at equal tokens.

What matters most comes first. What would not fit into ``--minutes`` is left out, and said; at 9
minutes it ends in any case, and says where it was.

Results are appended to ``runs/bench/gpu_training.jsonl``.
"""

from __future__ import annotations

import argparse
import faulthandler
import itertools
import os
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch import Tensor

from mor import MoRConfig, MoRForCausalLM
from mor.bench.checks import KV_MODES, ROUTERS, Checks
from mor.errors import MorError
from mor.ops.attention import (
    SharedSegments,
    padded_segment_attention,
    segment_attention,
    shared_segment_attention,
)
from mor.ops.cross_entropy import linear_cross_entropy, plain_cross_entropy
from mor.ops.segments import Runs, Segments

ROOT = Path(__file__).parents[2]
OUT = "runs/bench/gpu_training.jsonl"


def close(name: str, found: list[Tensor], wanted: list[Tensor], limit: float) -> None:
    """Stop unless every tensor is within ``limit`` of the wanted one, relative to its scale."""
    for number, (one, two) in enumerate(zip(found, wanted, strict=True)):
        gap = float((one.float().cpu() - two.float().cpu()).norm() / two.float().norm())
        if not gap < limit:
            raise MorError(f"{name}: tensor {number} is {gap:.2e} off, more than {limit}")


def check_attention(device: str, dtype: torch.dtype, limit: float) -> None:
    """Segments of unequal length, queries of some tokens over the keys of all."""
    torch.manual_seed(0)
    keys = Segments.of(torch.arange(3).repeat_interleave(torch.tensor([200, 1, 131])))
    chosen = torch.rand(332) < 0.4
    chosen[0] = True
    places = chosen.nonzero().flatten()
    queries = Segments.of(torch.arange(3).repeat_interleave(torch.tensor([200, 1, 131]))[places])
    inputs = [torch.randn(332, heads, 64) for heads in (6, 2, 2)]
    direction = torch.randn(332, 6, 64)
    plain = [t.clone().requires_grad_() for t in inputs]
    wanted = padded_segment_attention(*plain, keys)
    there = [t.to(device, dtype).requires_grad_() for t in inputs]
    moved = Segments.of(
        torch.arange(3, device=device).repeat_interleave(torch.tensor([200, 1, 131], device=device))
    )
    found = segment_attention(*there, moved)
    pairs = []
    for out, leaves in ((found, there), (wanted, plain)):
        grads = torch.autograd.grad(out, leaves, direction.to(out.device, out.dtype))
        pairs.append([out.detach(), *grads])
    close(f"segment attention, {dtype}", pairs[0], pairs[1], limit)
    check_runs(there, pairs[1], direction, dtype, limit)
    at = places.to(device)
    some = Segments(queries.names, queries.lengths, at.device)
    pairs = []
    for leaves, rows, one, two in (
        (there, at, some, moved),
        (plain, places, queries, keys),
    ):
        picked = leaves[0][rows]
        out = shared_segment_attention(picked, leaves[1], leaves[2], SharedSegments(rows, one, two))
        grads = torch.autograd.grad(out, leaves, direction[places].to(out.device, out.dtype))
        pairs.append([out.detach(), *grads])
    close(f"shared segment attention, {dtype}", pairs[0], pairs[1], limit)


def check_runs(
    leaves: list[Tensor], wanted: list[Tensor], direction: Tensor, dtype: torch.dtype, limit: float
) -> None:
    """The same segments, lengths on the device alone, with places behind them that hold nothing."""
    device, more = leaves[0].device, 37
    lengths = torch.tensor([200, 1, 131, more], device=device)
    row_of = torch.arange(4, device=device).repeat_interleave(lengths).clamp(max=2)
    real = torch.arange(len(row_of), device=device) < 332
    padded = [torch.cat((leaf, leaf.new_full((more, *leaf.shape[1:]), 7.0))) for leaf in leaves]
    out = segment_attention(*padded, Runs(row_of, real, 3, 200))
    if not out[332:].isfinite().all():
        raise MorError(f"runs of unknown lengths, {dtype}: places behind them are not finite")
    grads = torch.autograd.grad(out[:332], leaves, direction.to(device, out.dtype))
    close(f"runs of unknown lengths, {dtype}", [out[:332].detach(), *grads], wanted, limit)


def check_loss(device: str, dtype: torch.dtype, limit: float) -> None:
    """The chunked loss and its two gradients."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(700, 64), torch.randn(1000, 64) * 0.2
    targets = torch.randint(1000, (700,))
    targets[::7] = -100
    results = []
    for place, kind in ((device, dtype), ("cpu", torch.float32)):
        leaves = [t.to(place, kind).requires_grad_() for t in (hidden, weight)]
        aims = targets.to(place)
        if kind == torch.float32 and place == "cpu":
            loss = plain_cross_entropy(leaves[0] @ leaves[1].t(), aims)
        else:
            loss = linear_cross_entropy(*leaves, aims, 256)
        results.append([loss.detach(), *torch.autograd.grad(loss, leaves)])
    close(f"loss, {dtype}", results[0], results[1], limit)


def check_model(device: str, router: str, kv_sharing: str, masked: bool) -> None:
    """One training step in float32 on the device and on the CPU."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(97, (3, 140), generator=generator)
    documents = (torch.rand(3, 140, generator=generator) < 0.05).cumsum(1)
    found = []
    for place in (device, "cpu"):
        torch.manual_seed(0)
        config = MoRConfig(
            vocab_size=97,
            hidden_size=64,
            num_recursions=3,
            num_recursion_layers=2,
            router=router,
            kv_sharing=kv_sharing,
            initializer_range=0.1,
        )
        model = MoRForCausalLM(config).to(place).train()
        rows = ids.to(place)
        mask = documents.to(place) if masked else None
        out = model(rows, labels=rows, document_ids=mask, return_logits=False)
        out.loss.backward()
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        found.append([out.loss.detach(), *grads])
    close("step", found[0], found[1], 2e-3)


def benchmark(deadline: float, out: str, *words: str) -> None:
    """Run ``train_step.py`` as far as time goes; it times nothing that its checks find wrong."""
    command = ["benchmarks/train_step.py", "--out", out, *words]
    left = deadline - time.monotonic()
    if left < 20:
        print("left out for the time: python", *command, flush=True)
        return
    print("$ python", *command, flush=True)
    try:
        subprocess.run([sys.executable, *command], check=True, cwd=ROOT, timeout=left)
    except subprocess.TimeoutExpired:
        print("ended for the time", flush=True)


def main() -> None:
    """Check, then time, then measure memory."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--peak-flops", default="989e12", help="dense bfloat16 of the GPU (H100)")
    parser.add_argument("--rounds", default="5")
    parser.add_argument("--minutes", type=float, default=8.5, help="of all steps")
    parser.add_argument("--checks-only", action="store_true")
    args = parser.parse_args()
    deadline = time.monotonic() + 60 * args.minutes
    cuda = torch.device(args.device).type == "cuda"
    if cuda and not torch.cuda.is_available():
        parser.error("--device=cuda, but torch sees no GPU; use --device cpu to try the steps out")
    torch.backends.cuda.matmul.allow_tf32 = False
    checks = Checks()
    for dtype, limit in ((torch.float32, 1e-4), (torch.bfloat16, 2e-2)):
        checks.run(f"attention, {dtype}", check_attention, args.device, dtype, limit)
        checks.run(f"loss, {dtype}", check_loss, args.device, dtype, limit)
    for case in itertools.product(ROUTERS, KV_MODES, (False, True)):
        name = "step, {}, KV {}, documents {}".format(*case)
        checks.run(name, check_model, args.device, *case)
    checks.finish()
    if args.checks_only:
        return
    if not cuda:
        small = ("--rounds", "1", "--batch", "2", "--seq-len", "128", "--dtype", "bfloat16")
        some = ("--documents", "40", "--only", "vanilla,threshold kv")
        benchmark(deadline, os.devnull, *small, *some)
        few = ("--memory", "--only", "vanilla 32,expert_choice R2 32")
        benchmark(deadline, os.devnull, *small, *few)
        return
    same = ("--device", args.device, "--dtype", "bfloat16", "--seq-len", "2048", "--compile")
    same += ("--peak-flops", args.peak_flops, "--rounds", args.rounds)
    sizes = [("--preset", "360m", "--batch", "8"), ("--preset", "135m", "--batch", "16")]
    only = ("--only", "vanilla,expert_choice,transformers llama", "--recursions", "2")
    # Few variants first: compiling twelve of them took longer than an H100 was lent for.
    for more in (only, (*only, "--memory"), ("--documents", "0"), ("--documents", "512")):
        for size in sizes:
            benchmark(deadline, OUT, *same, *size, *more)


if __name__ == "__main__":
    # Whatever hangs on a device is no longer waited for; whoever lends it stops at ten minutes.
    faulthandler.dump_traceback_later(540, exit=True, file=sys.__stderr__)
    try:
        main()
    finally:
        faulthandler.cancel_dump_traceback_later()
