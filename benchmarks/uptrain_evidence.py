"""Uptraining of SmolLM2-135M-Instruct, measured: starts, relaxations, distillation, baselines.

    python benchmarks/uptrain_text.py runs/evidence
    python benchmarks/uptrain_evidence.py runs/evidence                              # one CPU core
    python benchmarks/uptrain_evidence.py runs/evidence-gpu --device cuda --tokens 6e6 --batch 16

Runs the list below in order, each a run folder below FOLDER/runs, and appends to
``benchmarks/results/uptrain.jsonl``: a line per evaluation (NLL of the Brown corpus in sequences as
long as those trained on, against tokens, seconds and processor seconds) and a line per finished run
(the same text in sequences of 512, as in the log's table of foldings). What is finished is left
out, what was interrupted goes on: start it again at any time. ``--only NAME ...`` picks runs.
``--tokens`` is the length of the longest run; all others keep their proportion to it.
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

FULL = 61_440
"""Tokens of the longest run; those below are for this."""
SHORT = 6_144
INITS = ("stepwise", "average", "upper", "random", "lower")
RESULTS = Path(__file__).parent / "results" / "uptrain.jsonl"


def fold(recursions: int, init: str, rank: int = 0) -> dict[str, Any]:
    """A folding of the list: norms each source layer's own, so that only matrices are shared."""
    relaxed = {"relaxation": "lora", "rank": rank} if rank else {}
    return {"num_recursions": recursions, "init": init, "norms": "own", **relaxed}


def name_of(folding: dict[str, Any]) -> str:
    """``r2-stepwise-lora16``."""
    rank = folding.get("rank")
    return f"r{folding['num_recursions']}-{folding['init']}" + (f"-lora{rank}" if rank else "")


def listed(best: str, longest: str) -> list[dict[str, Any]]:
    """Every run: name, group, start, tokens, and what is special about it.

    Args:
        best: the start that the ablations use.
        longest: the start of the long run.
    """
    start = [{"group": "start", "fold": fold(2, init), "tokens": SHORT} for init in INITS]
    long = [
        {"name": "recursive", "group": "long", "fold": fold(2, longest), "tokens": FULL},
        {
            "name": "mor",
            "group": "long",
            "start": "recursive",
            "tokens": FULL // 2,
            "rate": 5e-4,
            "model": {"router": "threshold"},
            "rates": {"routers": 10.0},
        },
        {"name": "scratch", "group": "baseline", "scratch": True, "tokens": FULL // 4},
        {"name": "tenth", "group": "long", "fold": fold(2, longest), "tokens": FULL // 40},
    ]
    base = {"fold": fold(2, best), "tokens": SHORT}
    ablations = [
        {"name": f"r2-{best}-undistilled", "group": "distilled", "distil": False, **base},
        {"group": "rank", "fold": fold(2, best, 16), "tokens": SHORT},
        {"name": "dropped", "group": "baseline", "drop": True, "tokens": SHORT},
        {"name": f"r2-{best}-logits", "group": "distilled", "hidden": 0.0, **base},
        {"group": "rank", "fold": fold(2, best, 64), "tokens": SHORT},
    ]
    deeper = [{"group": "start", "fold": fold(3, init), "tokens": SHORT} for init in INITS]
    return start[:2] + long + start[2:] + ablations + deeper


def main() -> None:
    """Do what is left of the list."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--tokens", type=float, default=FULL, help="of the longest run")
    parser.add_argument("--seq-len", type=int, default=128)
    parser.add_argument("--batch", type=int, default=1, help="sequences per step")
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--hidden", type=float, default=3.0, help="weight of the stream's error")
    parser.add_argument("--best", default="stepwise", help="start of the ablations")
    parser.add_argument("--longest", default="stepwise", help="start of the long run")
    parser.add_argument("--only", nargs="*", default=None)
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    if args.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    warnings.simplefilter("ignore", UserWarning)  # thinning is meant
    Evidence(args).all()


class Evidence:
    """The list, and where its results go."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.folder = args, args.folder
        self.scale = args.tokens / FULL

    def all(self) -> None:
        """Every run that is not finished."""
        self.source()
        for run in listed(self.args.best, self.args.longest):
            run.setdefault("name", name_of(run["fold"]) if "fold" in run else None)
            if self.args.only is None or run["name"] in self.args.only:
                self.one(run)
                if run.get("model", {}).get("router"):
                    self.calibrate(run["name"])

    def rows(self) -> list[dict[str, Any]]:
        """What was written so far."""
        if not self.args.out.is_file():
            return []
        return [json.loads(line) for line in self.args.out.read_text("utf-8").splitlines()]

    def write(self, row: dict[str, Any]) -> None:
        """Append a line."""
        self.args.out.parent.mkdir(exist_ok=True)
        with self.args.out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def nll(self, folder: Path, seq_len: int, tokens: int = 4096) -> float:
        """Of the Brown text under the causal rule."""
        import torch

        from mor.eval.folds import text_sequences
        from mor.eval.passes import run_pass
        from mor.hf.load import load_model, load_tokenizer

        model: Any = load_model(folder)
        if self.args.device == "cuda":
            model.cuda()
        tokenizer = load_tokenizer(self.folder / "source")
        rows = text_sequences(self.folder / "brown.txt", tokenizer, seq_len, tokens)
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
        from mor.hf.load import load_model, load_tokenizer
        from mor.hf.write import write_model

        model: Any = load_model(folder)
        data = PackedDataset(self.folder / "data", "train", 512, order_seed=1)
        calibrate(model, data, max_sequences=16, batch_size=2, capacities=capacities)
        tokenizer = load_tokenizer(self.folder / "source")
        found = {"capacity": capacities[-1]}
        for length, tokens in ((512, 4096), (self.args.seq_len, 2048)):
            rows = text_sequences(self.folder / "brown.txt", tokenizer, length, tokens)
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

    def final_row(self, run: dict[str, Any], **fields: Any) -> None:
        """A line for a finished run."""
        self.write({"run": run["name"], "group": run["group"], "kind": "final", **fields})

    def source(self) -> None:
        """The source model's own NLL, once."""
        if any(row["run"] == "source" for row in self.rows()):
            return
        folder, length = self.folder / "source", self.args.seq_len
        self.final_row(
            {"name": "source", "group": "baseline"},
            nll_512=self.nll(folder, 512),
            nll=self.nll(folder, length, 16 * 128),
            seq_len=length,
            tokens=0,
        )

    def one(self, run: dict[str, Any]) -> None:
        """Fold, train (or go on) and score one run, unless it is in the results."""
        from mor.train import train

        name = run["name"]
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
                row = {"run": name, "group": run["group"], "kind": "curve"}
                self.write(row | last | {"nll": entry["eval_nll"]})
        summary = json.loads((recipe.run_dir / "summary.json").read_text("utf-8"))
        facts = ("parameters", "num_recursions", "router", "steps", "seed", "commit", "cpu")
        self.final_row(
            run,
            **started,
            **last,
            nll=summary["eval_nll"],
            nll_512=self.nll(recipe.run_dir, 512),
            fold_cpu_s=fold_s,
            device=self.args.device,
            seq_len=self.args.seq_len,
            sequences_per_step=self.args.batch,
            learning_rate=recipe.train.learning_rate,
            **{key: summary[key] for key in facts if key in summary},
        )
        shutil.rmtree(recipe.run_dir / "checkpoints", ignore_errors=True)  # a gigabyte each

    def start(self, run: dict[str, Any]) -> Path | None:
        """The folder that a run starts from."""
        from mor.hf.fold import Folding, fold_folder

        if run.get("scratch"):
            return None
        if "start" in run:
            return self.folder / "runs" / run["start"]
        out = self.folder / "folds" / (name_of(run["fold"]) if "fold" in run else "dropped")
        if not out.is_dir():
            if run.get("drop"):
                self.drop(out)
            else:
                fold_folder(self.folder / "source", out, Folding(**run["fold"]), self.args.device)
        return out

    def drop(self, out: Path) -> None:
        """The source with as many layers as the R = 2 model has of its own, evenly spaced."""
        from mor import MoRConfig, MoRForCausalLM
        from mor.hf.fold import Folding, layer_map
        from mor.hf.llama import plain_depth
        from mor.hf.load import load_model
        from mor.hf.write import write_model

        source = load_model(self.folder / "source")
        shared = layer_map(source.config, Folding(2))["shared_layers"]
        kept = [0, *(layers[0] for layers in shared), source.config.num_hidden_layers - 1]
        fields = source.config.to_dict() | plain_depth(len(kept))
        fields.pop("num_hidden_layers", None)
        model = MoRForCausalLM(MoRConfig(**fields)).eval()
        model.load_state_dict(source.state_dict(), strict=False)

        def layers(of: Any) -> list[Any]:
            return [*of.model.prelude_layers, *of.model.block, *of.model.coda_layers]

        for ours, number in zip(layers(model), kept, strict=True):
            ours.load_state_dict(layers(source)[number].state_dict())
        write_model(model, self.folder / "source", out, {"fold.json": {"stack": kept}})

    def recipe(self, run: dict[str, Any], start: Path | None) -> Any:
        """The recipe of a run."""
        from mor import MoRConfig
        from mor.hf.fold import Folding, folded_config
        from mor.train import parse_recipe

        args = self.args
        steps = max(1, round(run["tokens"] * self.scale / (args.batch * args.seq_len)))
        every = max(1, min(steps // 2, round(SHORT * self.scale / (args.batch * args.seq_len))))
        raw: dict[str, Any] = {
            "name": run["name"],
            "data": {
                "path": str(self.folder / "data"),
                "seq_len": args.seq_len,
                "validation_path": str(self.folder / "brown"),
            },
            "train": {
                "budget": {"steps": steps},
                "batch_size": args.batch,
                "learning_rate": run.get("rate", args.rate),
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
        if args.device == "cuda":
            raw["train"] |= {"dtype": "bfloat16"}
        if start is None:  # the same network as the routed run's, nothing learnt
            source = MoRConfig.from_pretrained(self.folder / "source")
            routed = Folding(
                2, norms="own", router="threshold", capacity_warmup_steps=steps * 2 // 5
            )
            config = folded_config(source, routed).to_dict()
            known = parse_recipe(
                json.loads(json.dumps(self.shape(config)))
                | {k: raw[k] for k in ("name", "data")}
                | {"train": raw["train"], "output": raw["output"]}
            )
            return known
        distill = {"teacher": str(self.folder / "source"), "hidden": run.get("hidden", args.hidden)}
        raw["uptrain"] = {
            "start": str(start),
            "freeze": ["embeddings"],
            "rates": run.get("rates", {}),
            "distill": distill if run.get("distil", True) else None,
        }
        model = dict(run.get("model", {}))
        if model:
            model["router_capacity_warmup_steps"] = steps * 2 // 5
        raw["model"] = model
        return parse_recipe(raw)

    @staticmethod
    def shape(config: dict[str, Any]) -> dict[str, Any]:
        """The ``model`` section of a network as its configuration describes it."""
        import inspect

        from mor import MoRConfig

        names = set(inspect.signature(MoRConfig.__init__).parameters) - {"num_hidden_layers"}
        return {"model": {k: v for k, v in config.items() if k in names and v is not None}}


if __name__ == "__main__":
    main()
