"""The recipe of a training stage of ``mor compress``: the source teaches, the embedding stays."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mor.compress.settings import Settings
from mor.train import Recipe, parse_recipe


def stage_recipe(
    settings: Settings,
    name: str,
    start: Path,
    teacher: Path,
    data: Path,
    steps: int,
    seq_len: int,
    model: dict[str, Any] | None = None,
) -> Recipe:
    """A recipe as docs/uptraining.md has it.

    Args:
        settings: batch, learning rate (halved where a router is learned), seed.
        name: of the run folder in ``out/runs``.
        start, teacher, data: folders.
        steps: to train. seq_len: tokens per sequence.
        model: fields of the router, where one is added.
    """
    return parse_recipe(
        {
            "name": name,
            "model": model or {},
            "uptrain": {
                "start": str(start),
                "freeze": ["embeddings"],
                "distill": {"teacher": str(teacher), "hidden": 3.0},
            },
            "data": {"path": str(data), "seq_len": seq_len},
            "train": {
                "budget": {"steps": steps},
                "batch_size": settings.batch_size,
                "learning_rate": settings.learning_rate / (2 if model else 1),
                "weight_decay": 0.0,
                "decay_fraction": 0.3,
                "save_steps": max(1, min(500, steps // 10)),
                "eval_sequences": max(1, settings.sample_tokens // seq_len),
                "seed": settings.seed,
                "report_to": [],
            },
            "output": str(settings.out / "runs"),
        },
        "mor compress",
    )
