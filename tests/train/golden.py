"""Small runs whose losses are on record: ``golden_losses.json``, made before the loop was our own.

    python -m tests.train.golden OUT.json

The record was written by the version that trained through Transformers' Trainer (commit 6ff07fe);
the shares of depths of ``documents`` later, since padding no longer counts in them, and validation
losses, since their sample is spread over the split.
``test_golden_losses.py`` makes the same runs and compares. A digest of the weights tells whether
two runs are the same to the last bit; it holds on one machine and one build of torch only.
"""

from __future__ import annotations

import copy
import hashlib
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from mor import MoRConfig, MoRForCausalLM
from mor.train import load_recipe, parse_recipe, train
from tests.tiny import SEQ_LEN, prepare_tiny, tiny_fields

RECORD = Path(__file__).with_name("golden_losses.json")
NAMES = ("loss", "lm_loss", "grad_norm", "learning_rate", "eval_loss", "epoch", "tokens", "flops")
WIDE = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}
WIDE |= {"vocab_size": 300, "initializer_range": 0.3}

# Name: router, fields of the model, of the training section, of the data section.
RUNS: dict[str, tuple[str, dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "fixed": ("fixed", {}, {}, {}),
    "expert_choice": (
        "expert_choice",
        {"router_capacity_warmup_steps": 4, "router_z_loss_coef": 0.01},
        {"eval_steps": 3},
        {},
    ),
    "threshold": ("threshold", {"router_capacity_warmup_steps": 4}, {"logging_steps": 3}, {}),
    "token_choice": (
        "token_choice",
        {"router_balancing": "loss_free", "router_z_loss_coef": 0.1},
        {},
        {},
    ),
    "random": ("random", {}, {"eval_steps": 2, "num_workers": 1}, {}),
    "auxiliary router": (
        "expert_choice",
        {"router_objective": "aux_router", "kv_sharing": "recursive", "share_norms": False},
        {},
        {},
    ),
    "bfloat16": ("expert_choice", {}, {"dtype": "bfloat16"}, {}),
    "checkpointing": ("token_choice", {}, {"gradient_checkpointing": True}, {}),
    "documents": ("threshold", {}, {}, {"packing": "best_fit", "document_mask": True}),
    "one micro-batch": (
        "expert_choice",
        {"tie_word_embeddings": False},
        {"gradient_accumulation_steps": 1, "global_batch_size": 4, "batch_size": 4},
        {},
    ),
}
DEMO = ("vanilla", "recursive", "expert_choice", "threshold")
UPTRAIN: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "recursive": ({"freeze": ["embeddings"], "rates": {"block": 2.0}}, {"lm": 0.5}),
    "bfloat16": ({}, {"lm": 0.5, "top_k": 9, "temperature": 2.0}),
    "router": ({"rates": {"routers": 10.0}}, {}),
}


def all_recipes(root: Path) -> dict[str, Any]:
    """Every run as a recipe, by name; makes the data and the models that they need."""
    data = prepare_tiny(root)
    found = {}
    for name, (router, model, training, reading) in RUNS.items():
        raw = tiny_fields(data, root / "runs", router) | {"name": name.replace(" ", "-")}
        raw["model"] |= model
        raw["train"] |= training
        raw["data"] |= reading
        found[name] = parse_recipe(raw)
    for name in DEMO:
        recipe = load_recipe(f"demo/{name}")
        raw = json.loads(recipe.model_dump_json()) | {"name": f"demo-{name}"}
        raw |= {"output": str(root / "runs"), "data": {"path": str(data), "seq_len": SEQ_LEN}}
        small = {"budget": {"steps": 6}, "logging_steps": 1, "eval_sequences": 4, "report_to": []}
        raw["train"] |= small
        found[f"demo/{name}"] = parse_recipe(raw)
    for name, (section, distill) in UPTRAIN.items():
        raw = tiny_fields(data, root / "runs") | {"name": f"uptrain-{name}", "model": {}}
        start, teacher = models(root)
        raw["uptrain"] = copy.deepcopy(section) | {
            "start": str(start),
            "distill": {"teacher": str(teacher)} | distill,
        }
        if name == "router":
            raw["model"] = {"router": "threshold", "router_capacity_warmup_steps": 3}
        raw["train"] |= {"dtype": "bfloat16"} if name == "bfloat16" else {}
        found[f"uptrain/{name}"] = parse_recipe(raw)
    return found


def models(root: Path) -> tuple[Path, Path]:
    """A recursive model to start from, and a vanilla one of the same depth to learn from."""
    shapes = {
        "start": {"num_recursions": 2, "num_recursion_layers": 2, "router": "fixed"},
        "teacher": {"num_recursions": 1, "num_recursion_layers": 4, "router": "fixed"},
    }
    for number, (name, shape) in enumerate(shapes.items()):
        if not (root / name).exists():
            torch.manual_seed(number)
            config = MoRConfig(**WIDE, **shape, num_prelude_layers=1, num_coda_layers=1)
            MoRForCausalLM(config).save_pretrained(root / name)
    return root / "start", root / "teacher"


def measure(recipe: Any) -> dict[str, Any]:
    """Train; the numbers of the log that no clock decides, and a digest of the weights."""
    folder = train(recipe)
    entries = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    kept = {
        name: [entry[name] for entry in entries if name in entry]
        for name in sorted({name for entry in entries for name in entry})
        if name in NAMES or name.startswith(("router/", "kd/"))
    }
    weights = (folder / "model" / "model.safetensors").read_bytes()
    return {"log": kept, "weights": hashlib.sha256(weights).hexdigest()}


def main() -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        recipes = all_recipes(Path(folder))
        record = {name: measure(recipe) for name, recipe in recipes.items()}
    Path(sys.argv[1]).write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
