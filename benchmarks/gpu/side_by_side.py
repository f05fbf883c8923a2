"""135M vanilla and R = 2 at equal FLOPs, as far as some minutes of one GPU go.

    python benchmarks/gpu/side_by_side.py --data data/english --minutes 25
    python benchmarks/gpu/side_by_side.py --device cpu --minutes 2   # at a toy size, to try it

A few steps of each are timed, and both get the same training FLOPs: as many as fit into the minutes
together. Each is then trained to the end of its cool-down and evaluated (causal NLL, the leaky one,
time, peak memory). A call stops after `--call-minutes` (8), with a checkpoint, and the same command
goes on: machines are often lent a little at a time. Results are appended to
`OUT/side_by_side.jsonl`. `--data` is a prepared folder; its vocabulary is the models'. Without it
the text that ships with the model `prose` is used, which shows that the steps work, no more.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from mor.bench.device import parse_device
from mor.data import DataIndex, PackedDataset
from mor.disk import append_jsonl
from mor.errors import MorError
from mor.eval import evaluate
from mor.hf.load import load_model
from mor.provenance import provenance
from mor.run_files import EVAL, RECIPE, SHIPPED, SUMMARY
from mor.train import Recipe, dump_recipe, load_recipe
from mor.train.plan.budget import training_flops
from mor.train.plan.probe import probe_speed

ROWS = "paper/135m-vanilla", "paper/135m-expert-2"
RESERVE = 0.12
"""Of the time, for compiling, checkpoints and evaluation."""


def base_changes(args: argparse.Namespace) -> list[str]:
    """What differs from the paper's recipe: smaller batches and this machine."""
    changes = [
        f"data.path={args.data}",
        f"output={json.dumps(str(args.out))}",
        "train.global_batch_size=null",
        "train.gradient_accumulation_steps=1",
        "train.warmup_steps=null",
        "train.warmup_fraction=0.05",
        f"train.batch_size={args.batch_size}",
        f"train.learning_rate={args.learning_rate}",
        "train.report_to=[]",
        "train.eval_sequences=64",
        f"train.compile={'true' if args.device == 'cuda' else 'false'}",
    ]
    if args.device == "cpu":
        changes += [
            "model.hidden_size=32", "model.intermediate_size=64", "model.head_dim=16",
            "model.num_attention_heads=2", "model.num_key_value_heads=1", "data.seq_len=64",
            "train.dtype=float32", "train.batch_size=4", "train.eval_sequences=4",
        ]  # fmt: skip
    return changes


def recipe_of(row: str, args: argparse.Namespace, *changes: str) -> Recipe:
    """The recipe of a row on this machine."""
    own = []
    if args.device == "cpu":  # a toy of the same kind
        recursions = 2 if "expert" in row else 1
        own = [f"model.num_recursion_layers={4 // recursions}"]
    return load_recipe(row, [*base_changes(args), *own, *changes])


def plan(args: argparse.Namespace) -> dict[str, Any]:
    """Time both, and share the minutes out so that both get the same FLOPs."""
    index = DataIndex.load(args.data)
    rows: dict[str, Any] = {}
    for row in ROWS:
        recipe = recipe_of(row, args, "train.budget={steps: 100}")
        config = recipe.model_config_for(index.vocab_size, index.eos_token_id, index.known_bos())
        speed = probe_speed(recipe, config).tokens_per_s
        rows[row] = {
            "tokens_per_s": speed,
            "seconds_per_flop": 1 / (speed * training_flops(config, recipe.data.seq_len)),
        }
        print(f"{row}: {speed:,.0f} tokens/s", flush=True)
    seconds = args.minutes * 60 * (1 - RESERVE)
    flops = seconds / sum(row["seconds_per_flop"] for row in rows.values())
    return {"flops": flops, "rows": rows, "minutes": args.minutes, "batch_size": args.batch_size}


def train(recipe: Recipe, deadline: float, out: Path) -> bool:
    """Train on until it is finished, or until the deadline; whether it is finished."""
    folder = recipe.run_dir
    if (folder / SUMMARY).is_file():
        return True
    path = out / f"{recipe.name}.yaml"
    path.write_text(dump_recipe(recipe), encoding="utf-8")
    command = [sys.executable, "-m", "mor.cli", "train", str(path)]
    command += ["--resume"] if (folder / RECIPE).is_file() else []
    child = subprocess.Popen(command)
    try:
        status = child.wait(max(1.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        child.send_signal(signal.SIGTERM)  # it ends after the step at hand, with a checkpoint
        status = child.wait()
    # Killed before its first step, or after its last, it has saved what there was.
    if status not in (0, 130, -signal.SIGTERM):
        raise SystemExit(f"{recipe.name} failed with exit status {status}")
    return (folder / SUMMARY).is_file()


def score(recipe: Recipe, args: argparse.Namespace) -> dict[str, Any]:
    """Evaluate a finished run; kept in its folder."""
    path = recipe.run_dir / EVAL
    if not path.is_file():
        dataset = PackedDataset(args.data, "validation", recipe.data.seq_len)
        model = load_model(recipe.run_dir).to(args.device)  # type: ignore[arg-type]
        result = evaluate(model, dataset, max_sequences=args.eval_sequences, batch_size=4)
        path.write_text(json.dumps(result) + "\n", encoding="utf-8")
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def main() -> None:
    """Plan once, train, evaluate, record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--data", type=Path, default=SHIPPED / "prose/held-out")
    parser.add_argument("--out", type=Path, default=Path("runs/bench/side_by_side"))
    parser.add_argument("--minutes", type=float, default=25.0, help="for both, over all calls")
    parser.add_argument("--call-minutes", type=float, default=8.0, help="stop after these")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--eval-sequences", type=int, default=256)
    args = parser.parse_args()
    deadline = time.monotonic() + args.call_minutes * 60
    try:
        parse_device(args.device)
    except MorError as error:
        parser.error(f"{error}, to try the steps out")
    if args.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    args.out.mkdir(parents=True, exist_ok=True)
    kept = args.out / "plan.json"
    if not kept.is_file():
        kept.write_text(json.dumps(plan(args)) + "\n", encoding="utf-8")
    planned = json.loads(kept.read_text(encoding="utf-8"))
    records = []
    for row in ROWS:
        recipe = recipe_of(
            row, args, f"train.budget={{flops: {planned['flops']:.6e}}}",
            "train.save_steps=500", "train.eval_steps=500",
        )  # fmt: skip
        if not train(recipe, deadline, args.out):
            print(f"{recipe.name}: stopped for now; the same command goes on", flush=True)
            return
        result = score(recipe, args)
        summary = json.loads((recipe.run_dir / SUMMARY).read_text(encoding="utf-8"))
        records.append({"row": row, "plan": planned, "summary": summary, "eval": result})
        leaky = "" if result["gap"] is None else f", causal - leaky {result['gap']:+.4f}"
        print(f"{row}: causal NLL {result['causal']['nll']:.4f}{leaky}", flush=True)
    for record in records:
        append_jsonl(args.out / "side_by_side.jsonl", record | provenance())
    vanilla, ours = (record["eval"]["causal"]["nll"] for record in records)
    print(f"R = 2 minus vanilla at equal FLOPs: {ours - vanilla:+.4f} nats")


if __name__ == "__main__":
    main()
