"""Uptraining of SmolLM2-135M-Instruct, measured: starts, relaxations, distillation, baselines.

    python benchmarks/uptrain/text.py runs/evidence
    python benchmarks/uptrain/evidence.py runs/evidence                              # one CPU core
    python benchmarks/uptrain/evidence.py runs/evidence-gpu --device cuda --tokens 2.5e7 --batch 16

Runs :data:`runs.RUNS` in order, each a run folder below FOLDER/runs, and appends to
``FOLDER/uptrain.jsonl`` (``--out`` names another file, such as the tracked
``benchmarks/results/uptrain.jsonl``): a line per evaluation (NLL of the Brown corpus in sequences
as long as those trained on, against tokens, seconds and processor seconds) and a line per finished
run (the same text in sequences of 512, as in the log's table of foldings). What is finished is left
out, what was interrupted goes on: start it again at any time. ``--only NAME ...`` picks runs.
``--tokens`` is the length of the run ``window``; all others keep their proportion to it.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import time
import warnings
from pathlib import Path
from typing import Any

from runs import LONG, RUNS, SHORT, Run


def main() -> None:
    """Do what is left of the list."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--tokens", type=float, default=LONG, help="of the run `window`")
    parser.add_argument("--seq-len", type=int, default=128)
    parser.add_argument("--batch", type=int, default=1, help="sequences per step")
    parser.add_argument("--only", nargs="*", default=None)
    parser.add_argument("--out", type=Path, help="JSON lines; default FOLDER/uptrain.jsonl")
    args = parser.parse_args()
    args.out = args.out or args.folder / "uptrain.jsonl"
    if args.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    warnings.simplefilter("ignore", UserWarning)  # thinning is meant
    Evidence(args).all()


class Evidence:
    """The list, and where its results go."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.folder = args, args.folder
        self.scale = args.tokens / LONG

    def all(self) -> None:
        """Every run that is not finished."""
        self.source()
        for run in RUNS:
            if self.args.only is None or run.name in self.args.only:
                self.one(run)
                if "router" in run.model and not run.scratch and run.gain is None:
                    self.calibrate(run.name)

    def rows(self) -> list[dict[str, Any]]:
        """What was written so far."""
        if not self.args.out.is_file():
            return []
        return [json.loads(line) for line in self.args.out.read_text("utf-8").splitlines()]

    def write(self, row: dict[str, Any]) -> None:
        """Append a line."""
        self.args.out.parent.mkdir(parents=True, exist_ok=True)
        with self.args.out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def nll(self, folder: Path, seq_len: int, tokens: int = 4096) -> float:
        """Of the Brown text under the causal rule."""
        import torch

        from mor.eval.folds import text_sequences
        from mor.eval.passes import run_pass
        from mor.folder.tokenizer import load_tokenizer
        from mor.hf.load import load_model

        model: Any = load_model(folder)
        if self.args.device == "cuda":
            model.cuda()
        tokenizer = load_tokenizer(self.folder / "source")
        rows = text_sequences(self.folder / "brown.txt", tokenizer, seq_len, tokens, model.config)
        with torch.no_grad():
            return run_pass(model, rows, len(rows), max(1, 1024 // seq_len), "causal").nll

    def calibrated(self, folder: Path, capacities: list[float]) -> dict[str, float]:
        """A routed model with boundaries set anew from training text: NLL, depth, and written out.

        The running mean that training keeps lags behind scores that move; a finished model's
        boundaries are better taken from the model itself (``mor calibrate``).
        """
        from mor.data import PackedDataset
        from mor.eval import calibrate
        from mor.eval.folds import text_sequences
        from mor.eval.passes import run_pass
        from mor.folder.tokenizer import load_tokenizer
        from mor.hf.convert.write import write_model
        from mor.hf.load import load_model

        model: Any = load_model(folder)
        data = PackedDataset(self.folder / "data", "train", 512, order_seed=1)
        calibrate(model, data, max_sequences=16, batch_size=2, capacities=capacities)
        tokenizer = load_tokenizer(self.folder / "source")
        found = {"capacity": capacities[-1]}
        for length, tokens in ((512, 4096), (self.args.seq_len, 2048)):
            rows = text_sequences(
                self.folder / "brown.txt", tokenizer, length, tokens, model.config
            )
            score = run_pass(model, rows, len(rows), max(1, 1024 // length), "causal")
            name = "nll_512" if length == 512 else "nll"
            found |= {name: score.nll, f"{name}_depth": score.score(1.0)["mean_depth"]}
        out = self.folder / f"calibrated-{folder.name}-{capacities[-1]}"
        if not out.is_dir():
            write_model(model, folder / "model", out)
        return found

    def calibrate(self, name: str) -> None:
        """Rows for a routed run at several capacities."""
        folder = self.folder / "runs" / name
        if not (folder / "summary.json").is_file():
            return
        for capacity in (0.5, 0.75):
            run = f"{name}-calibrated-{capacity}"
            if not any(row["run"] == run for row in self.rows()):
                found = self.calibrated(folder, [1.0, capacity])
                self.write({"run": run, "group": "calibrated", "kind": "final", **found})

    def final_row(self, name: str, group: str, **fields: Any) -> None:
        """A line for a finished run."""
        self.write({"run": name, "group": group, "kind": "final", **fields})

    def source(self) -> None:
        """The source model's own NLL, once."""
        if any(row["run"] == "source" for row in self.rows()):
            return
        folder, length = self.folder / "source", self.args.seq_len
        self.final_row(
            "source",
            "baseline",
            nll_512=self.nll(folder, 512),
            nll=self.nll(folder, length, 16 * 128),
            seq_len=length,
            tokens=0,
        )

    def one(self, run: Run) -> None:
        """Fold, train (or go on) and score one run, unless it is in the results."""
        from mor.train import train

        name = run.name
        if any(row["run"] == name and row["kind"] == "final" for row in self.rows()):
            return
        began = time.process_time()
        start = self.start(run)
        fold_s = time.process_time() - began
        started = {} if start is None else {"start_nll_512": self.nll(start, 512)}
        recipe = self.recipe(run, start)
        if not (recipe.run_dir / "summary.json").is_file():  # killed between training and scoring
            train(recipe, resume=recipe.run_dir.exists())
        logged = [json.loads(line) for line in (recipe.run_dir / "log.jsonl").open()]
        keys = ("tokens", "elapsed_s", "cpu_s", "flops", "kd/hidden", "kd/logits")
        keys += ("router/mean_depth", "tokens_per_s")
        last: dict[str, Any] = {}
        for entry in logged:
            last |= {key: entry[key] for key in keys if key in entry}
            if "eval_nll" in entry:
                row = {"run": name, "group": run.group, "kind": "curve"}
                self.write(row | last | {"nll": entry["eval_nll"]})
        summary = json.loads((recipe.run_dir / "summary.json").read_text("utf-8"))
        facts = ("parameters", "num_recursions", "router", "steps", "seed", "commit", "cpu")
        self.final_row(
            name,
            run.group,
            **started,
            **last,
            nll=summary["eval_nll"],
            nll_512=self.nll(recipe.run_dir, 512),
            fold_cpu_s=fold_s,
            device=self.args.device,
            seq_len=self.args.seq_len,
            sequences_per_step=self.args.batch * run.sequences,
            learning_rate=recipe.train.learning_rate,
            **{key: summary[key] for key in facts if key in summary},
        )
        shutil.rmtree(recipe.run_dir / "checkpoints", ignore_errors=True)  # a gigabyte each

    def start(self, run: Run) -> Path | None:
        """The folder that a run starts from."""
        from mor.hf.fold.fold import fold_folder
        from mor.hf.fold.plan import Folding

        if run.scratch:
            return None
        if run.start is not None:
            return self.folder / "runs" / run.start
        out = self.folder / "folds" / run.name
        if not out.is_dir():
            assert run.fold is not None
            fold_folder(self.folder / "source", out, Folding(**run.fold), self.args.device)
        return out

    def recipe(self, run: Run, start: Path | None) -> Any:
        """The recipe of a run."""
        from mor import MoRConfig
        from mor.hf.fold.plan import Folding, folded_config
        from mor.train import parse_recipe

        args = self.args
        batch = args.batch * run.sequences
        per_step = batch * args.seq_len
        steps = max(1, round(run.tokens * self.scale / per_step))
        every = max(1, min(steps // 2, max(steps // 20, round(SHORT * self.scale / per_step))))
        warmup = steps * 2 // 5
        raw: dict[str, Any] = {
            "name": run.name,
            "data": {
                "path": str(self.folder / "data"),
                "seq_len": args.seq_len,
                "validation_path": str(self.folder / "brown"),
            },
            "train": {
                "budget": {"steps": steps},
                "batch_size": batch,
                "learning_rate": run.rate,
                "weight_decay": 0.0,
                "warmup_fraction": 0.05,
                "decay_fraction": 0.3,
                "logging_steps": max(1, min(10, steps // 4)),
                "eval_steps": every,
                "eval_sequences": 16,
                "save_steps": max(every, steps // 4) if steps > 100 else None,
                "save_total_limit": 1,
                "report_to": [],
            },
            "output": str(self.folder / "runs"),
        }
        if run.schedule is not None:
            raw["train"]["depth_schedule"] = run.schedule
        if args.device == "cuda":
            raw["train"] |= {"dtype": "bfloat16"}
        if start is None:  # the same network as the routed run's, nothing learnt
            assert run.fold is not None
            source = MoRConfig.from_pretrained(self.folder / "source")
            folding = Folding(**run.fold, **run.model, capacity_warmup_steps=warmup)
            return parse_recipe(raw | self.shape(folded_config(source, folding).to_dict()))
        distill = {"teacher": str(self.folder / "source"), "hidden": run.hidden}
        raw["uptrain"] = {
            "start": str(start),
            "freeze": ["embeddings"],
            "rates": run.rates,
            "distill": distill if run.distil else None,
            "gain": run.gain,
        }
        raw["model"] = dict(run.model)
        if run.gain is not None:
            raw["uptrain"]["freeze"] = []
        elif "router" in run.model:
            raw["model"]["router_capacity_warmup_steps"] = warmup
        return parse_recipe(raw)

    @staticmethod
    def shape(config: dict[str, Any]) -> dict[str, Any]:
        """The ``model`` section of a network as its configuration describes it."""
        from mor.config import field_types

        names = set(field_types())
        return {"model": {k: v for k, v in config.items() if k in names and v is not None}}


if __name__ == "__main__":
    main()
