"""Prepared folders of a few tiny images and sounds, and a recipe over them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from mor.data.media import MediaIndex
from mor.data.media.index import MediaSplit
from mor.disk import digest
from mor.train import Recipe, parse_recipe

CLASSES = ("down", "flat", "up")


def make_folder(folder: Path, kind: str = "images", examples: int = 24, size: int = 8) -> Path:
    """A prepared folder whose classes can be told: a bar at a height, or a coefficient."""
    folder.mkdir(parents=True, exist_ok=True)
    draw = torch.Generator().manual_seed(5)
    splits, longest = {}, 0
    for name in ("train", "validation", "test"):
        labels = torch.arange(examples) % len(CLASSES)
        if kind == "images":
            images = torch.randint(60, (examples, size, size, 1), generator=draw, dtype=torch.uint8)
            for image, label in zip(images, labels.tolist(), strict=True):
                image[3 * label : 3 * label + 2] += 180
            tensors = {"images": images, "labels": labels}
        else:
            lengths = torch.randint(3, 12, (examples,), generator=draw)
            frames = torch.randn(int(lengths.sum()), len(CLASSES), generator=draw) / 4
            frames += torch.eye(len(CLASSES))[labels.repeat_interleave(lengths)]
            tensors = {"frames": frames, "lengths": lengths, "labels": labels}
            longest = max(longest, int(lengths.max()))
        save_file(tensors, folder / f"{name}.safetensors")
        splits[name] = MediaSplit(
            f"{name}.safetensors",
            examples,
            digest(folder / f"{name}.safetensors"),
            None if kind == "images" else int(tensors["lengths"].sum()),
        )
    MediaIndex(
        folder,
        kind,
        CLASSES,
        splits,
        (size, size, 1) if kind == "images" else (len(CLASSES),),
        "made for tests",
        None if kind == "images" else longest,
        (0.4,) if kind == "images" else (0.3,) * 3,
        (0.3,) if kind == "images" else (0.5,) * 3,
    ).save()
    return folder


def media_recipe(
    data: Path,
    output: Path,
    kind: str = "images",
    model: dict[str, Any] | None = None,
    **train: Any,
) -> Recipe:
    """A recipe of a few steps, with fields of ``model`` and ``train`` on top."""
    fields: dict[str, Any] = {
        "name": kind,
        "model": {
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_attention_heads": 2,
            "num_recursions": 2,
            "num_recursion_layers": 1,
            "router": "expert_choice",
        },
        "data": {"kind": kind, "path": str(data)},
        "train": {
            "budget": {"steps": 6},
            "batch_size": 4,
            "gradient_accumulation_steps": 2,
            "learning_rate": 1e-2,
            "logging_steps": 1,
            "eval_sequences": 12,
            "report_to": [],
        },
        "output": str(output),
    }
    if kind == "images":
        fields["model"]["patch_size"] = 2
    fields["model"] |= model or {}
    fields["train"] |= train
    return parse_recipe(fields)


def read_log(run: Path) -> list[dict[str, Any]]:
    """The entries of a run's log."""
    return [json.loads(line) for line in (run / "log.jsonl").read_text("utf-8").splitlines()]
