"""A study of two tiny rows, and results to report."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from tests.tiny import tiny_fields


def tiny_study(data: Path, **changes: Any) -> dict[str, Any]:
    """A study of two rows, one with a grid and two seeds, one with a branch."""
    fields = tiny_fields(data, Path("unused"))
    base = {name: fields[name] for name in ("model", "data", "train")}
    base["train"] |= {"eval_sequences": 2, "logging_steps": 4}
    return {
        "title": "Tiny",
        "reference": "vanilla",
        "base": base,
        "evaluate": {"max_sequences": 2, "batch_size": 2},
        "rows": {
            "vanilla": {
                "model": {"num_recursions": 1, "router": "fixed"},
                "train": {"branches": [{"steps": 5}]},
                "paper": {"nll": [3.0, 2.0], "few_shot": 42.3},
            },
            "expert": {
                "grid": {"train.learning_rate": [1e-2, 1e-3]},
                "seeds": [0, 1],
                "paper": {"nll": 1.5},
            },
        },
    } | changes


def written(folder: Path, content: dict[str, Any]) -> Path:
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


# Report -----------------------------------------------------------------------------------------


def record(row: str, nll: float, size: int = 100, **changes: Any) -> dict[str, Any]:
    summary = {
        "num_recursions": 2,
        "non_embedding_parameters": size,
        "shared_parameters": size // 2,
        "passes": 2.0,
        "tokens": 10,
        "train_flops": 1.0,
    }
    return {
        "row": row,
        "family": row,
        "seed": 0,
        "point": {},
        "budget": 0,
        "summary": summary | changes.pop("summary", {}),
        "causal": {"nll": nll, "mean_depth": 1.5},
        "gap": None,
        "few_shot": None,
        "paper": None,
    } | changes
