"""What the tests of uptraining share: recipes, and what a run leaves."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from mor import MoRConfig, MoRForCausalLM
from mor.hf.convert.llama import plain_depth
from tests.tiny import SEQ_LEN

WIDE = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}


def fields(data: Path, output: Path, source: Path, folded: Path, **uptrain: Any) -> dict[str, Any]:
    distill = {"teacher": str(source)} | uptrain.pop("distill", {})
    return {
        "name": "up",
        "model": uptrain.pop("model", {}),
        "data": {"path": str(data), "seq_len": SEQ_LEN},
        "uptrain": {"start": str(folded), "distill": distill} | uptrain,
        "train": {
            "budget": {"steps": 6},
            "batch_size": 2,
            "gradient_accumulation_steps": 2,
            "learning_rate": 1e-2,
            "logging_steps": 1,
            "eval_sequences": 2,
            "report_to": [],
        },
        "output": str(output),
    }


def steps_of(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "log.jsonl").read_text().splitlines()
    return [entry for entry in map(json.loads, lines) if "loss" in entry]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model" / "model.safetensors")


def other_model(folder: Path, **changes: Any) -> Path:
    config = MoRConfig(**({"vocab_size": 300} | WIDE | plain_depth(6) | changes))
    MoRForCausalLM(config).save_pretrained(folder)
    return folder


def as_if_killed(folder: Path, step: int) -> None:
    shutil.rmtree(folder / "model")
    (folder / "summary.json").unlink()
    for checkpoint in (folder / "checkpoints").iterdir():
        if int(checkpoint.name.split("-")[1]) > step:
            shutil.rmtree(checkpoint)


def cached(tmp_path: Path, **more: Any) -> dict[str, Any]:
    return {"top_k": 9, "cache": str(tmp_path / "cache")} | more
