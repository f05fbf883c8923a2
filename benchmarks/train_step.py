"""Time one training step of every family, router and KV mode side by side, in one run.

    python benchmarks/train_step.py                          # the table of docs
    python benchmarks/train_step.py --rounds 3 --only vanilla,expert_choice

Forward, backward and AdamW: hidden 256, 4/2 heads, FFN 768, vocabulary 4,096, sequence 512, batch
8; vanilla 11 layers, the others 1 + 3 x 3 + 1. Variants are interleaved round by round, so that a
busy machine hurts all alike; medians and quartiles are reported. Before timing, each variant's loss
and gradients are checked to be finite and a second forward to give the same loss. The baseline is
our vanilla model; Transformers' Llama of the same shape runs beside it. The quotient is time ratio
over FLOPs ratio: 1.0 means that every saved FLOP saved its time. FLOPs are those planned: token
choice's real ones follow its load.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from transformers import LlamaConfig, LlamaForCausalLM

from mor import MoRConfig, MoRForCausalLM
from mor.model.flops import flops_per_token
from mor.provenance import append_jsonl, provenance

WIDTHS = {
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
BLOCK = {"num_recursions": 3, "num_recursion_layers": 3}
VARIANTS: dict[str, dict] = {
    "vanilla": {"num_hidden_layers": 11},
    "recursive": BLOCK,
    "recursive kv": BLOCK | {"kv_sharing": "recursive"},
    "expert_choice": BLOCK | {"router": "expert_choice"},
    "expert_choice kv": BLOCK | {"router": "expert_choice", "kv_sharing": "recursive"},
    "expert_choice kv update": BLOCK
    | {"router": "expert_choice", "kv_sharing": "recursive_update"},
    "threshold": BLOCK | {"router": "threshold"},
    "token_choice": BLOCK | {"router": "token_choice"},
    "random": BLOCK | {"router": "random"},
}


def build(name: str, vocab: int) -> tuple[torch.nn.Module, MoRConfig | None]:
    """A model in training mode, and its configuration if it is ours."""
    torch.manual_seed(0)
    if name == "transformers llama":
        config = LlamaConfig(
            **WIDTHS, vocab_size=vocab, num_hidden_layers=11, tie_word_embeddings=True
        )
        return LlamaForCausalLM(config).train(), None
    ours = MoRConfig(**WIDTHS, vocab_size=vocab, **VARIANTS[name])
    return MoRForCausalLM(ours).train(), ours


def make_step(model: torch.nn.Module, ids: torch.Tensor) -> Callable[[], torch.Tensor]:
    """One optimiser step, router bookkeeping included."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95))
    router = getattr(getattr(model, "model", None), "router", None)

    def step() -> torch.Tensor:
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if router is not None:
            router.finish_step()
        return loss.detach()

    return step


def check(name: str, model: torch.nn.Module, ids: torch.Tensor) -> None:
    """Finite loss and gradients, and the same loss twice, or stop."""
    losses = []
    for _ in range(2):
        torch.manual_seed(1)  # the random router draws its scores
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        losses.append(float(loss.detach()))
    loss.backward()
    finite = all(bool(p.grad.isfinite().all()) for p in model.parameters() if p.grad is not None)
    model.zero_grad()
    if not finite or abs(losses[0] - losses[1]) > 1e-6:
        raise SystemExit(f"{name}: losses {losses}, gradients finite: {finite}; nothing is timed")


def main() -> None:
    """Check, time, print, record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--vocab", type=int, default=4096)
    parser.add_argument("--only", default="", help="comma-separated variants")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/train_step.jsonl"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    names = [*VARIANTS, "transformers llama"]
    if args.only:
        names = [name for name in names if name in args.only.split(",")]
    if "vanilla" not in names:
        names.insert(0, "vanilla")
    torch.manual_seed(0)
    ids = torch.randint(0, args.vocab, (args.batch, args.seq_len))
    steps, flops = {}, {}
    for name in names:
        model, config = build(name, args.vocab)
        check(name, model, ids)
        steps[name] = make_step(model, ids)
        one = MoRConfig(**WIDTHS, vocab_size=args.vocab, num_hidden_layers=11)
        flops[name] = flops_per_token(config or one, args.seq_len).training
        steps[name]()
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(args.rounds):
        for name in names:
            began = time.perf_counter()
            steps[name]()
            seconds[name].append(time.perf_counter() - began)
    report(args, names, seconds, flops)


def report(
    args: argparse.Namespace,
    names: list[str],
    seconds: dict[str, list[float]],
    flops: dict[str, float],
) -> None:
    """Print the table and append one JSON line per variant."""
    base = statistics.median(seconds["vanilla"])
    tokens = args.batch * args.seq_len
    table = Table(
        "variant", "ms (median)", "quartiles", "tokens/s", "time ratio", "FLOPs ratio", "quotient"
    )
    header = provenance()
    for name in names:
        times = sorted(seconds[name])
        median = statistics.median(times)
        low, high = times[len(times) // 4], times[-1 - len(times) // 4]
        ratio, flops_ratio = median / base, flops[name] / flops["vanilla"]
        table.add_row(
            name,
            f"{median * 1e3:.0f}",
            f"{low * 1e3:.0f}-{high * 1e3:.0f}",
            f"{tokens / median:,.0f}",
            f"{ratio:.3f}",
            f"{flops_ratio:.3f}",
            f"{ratio / flops_ratio:.3f}",
        )
        append_jsonl(
            args.out,
            {
                "benchmark": "train_step",
                "variant": name,
                "median_s": median,
                "quartiles_s": [low, high],
                "rounds": args.rounds,
                "tokens_per_s": tokens / median,
                "time_ratio": ratio,
                "flops_ratio": flops_ratio,
                "quotient": ratio / flops_ratio,
                "threads": args.threads,
                "batch": args.batch,
                "seq_len": args.seq_len,
                "vocab": args.vocab,
                "dtype": "float32",
                "mode": "eager",
            }
            | header,
        )
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
