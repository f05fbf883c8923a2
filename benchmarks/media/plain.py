"""Plain small networks at the training FLOPs of a recipe: a ViT of Transformers and a ConvNet.

    python benchmarks/media/plain.py image/animals --steps 800 --seed 0

Each model and learning rate of :data:`GRID` is trained on the recipe's own samples (order, changes
and batch size), with its optimiser and shape of schedule, for as many steps as cost the FLOPs of
the recipe's ``recursive`` row; what a step costs is counted by PyTorch's ``FlopCounterMode``,
forward once and backward twice that, as mor counts its own. Validation accuracy, which chooses, and
test accuracy go to ``--records`` as a line each; what has its line is left out.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from evidence import read
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import ViTConfig, ViTForImageClassification

from mor.data.media import MediaDataset, collate_media
from mor.disk import append_jsonl
from mor.provenance import provenance
from mor.train import load_recipe
from mor.train.data import find_config, load_batches, open_run_data
from mor.train.plan.budget import plan_budget
from mor.train.recipe.sections import TrainSection
from mor.train.step.optimiser import group_parameters, rate_factor, trapezoid

RECORDS = Path("runs/bench/plain.jsonl")


class ConvNet(nn.Module):
    """Five convolutions of 3 x 3 with batch norm, two of them of stride 2; mean, linear map."""

    def __init__(self, width: int, channels: int, classes: int) -> None:
        super().__init__()
        sizes = [(channels, width, 1), (width, 2 * width, 2), (2 * width, 2 * width, 1),
                 (2 * width, 4 * width, 2), (4 * width, 4 * width, 1)]  # fmt: skip
        self.layers = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(before, after, 3, stride, 1, bias=False), nn.BatchNorm2d(after), nn.GELU()
            )
            for before, after, stride in sizes
        )
        self.head = nn.Linear(4 * width, classes)

    def forward(self, pixels: Tensor) -> Tensor:
        """Pixels [B, C, H, W] -> logits [B, classes]."""
        for layer in self.layers:
            pixels = layer(pixels)
        found: Tensor = self.head(pixels.mean((2, 3)))
        return found


class Vit(nn.Module):
    """Transformers' ViT with the widths of the recipes' ``vanilla`` row."""

    def __init__(self, size: int, channels: int, classes: int, patch: int = 4) -> None:
        super().__init__()
        self.net = ViTForImageClassification(
            ViTConfig(
                hidden_size=64,
                num_hidden_layers=5,
                num_attention_heads=4,
                intermediate_size=128,
                image_size=size,
                patch_size=patch,
                num_channels=channels,
                num_labels=classes,
                hidden_dropout_prob=0.0,
                attn_implementation="eager",
            )
        )

    def forward(self, pixels: Tensor) -> Tensor:
        """Pixels [B, C, H, W] -> logits [B, classes]."""
        found: Tensor = self.net(pixels).logits
        return found


MODELS: dict[str, Callable[[int, int, int], nn.Module]] = {
    "convnet-16": lambda size, channels, classes: ConvNet(16, channels, classes),
    "convnet-24": lambda size, channels, classes: ConvNet(24, channels, classes),
    "vit": Vit,
}
GRID = [
    ("convnet-16", 3e-3),
    ("vit", 1e-3),
    ("convnet-24", 3e-3),
    ("convnet-16", 1e-2),
    ("vit", 3e-3),
]


def run_one(
    family: str, name: str, rate: float, steps: int, seed: int, overrides: list[str]
) -> dict[str, Any]:
    """Train and score one network. The line of the run."""
    given = [f"train.budget.steps={steps}", f"train.seed={seed}", *overrides]
    recipe = load_recipe(f"{family}-recursive", given)
    data, per_step = open_run_data(recipe, recipe.train.batch_size), recipe.train.batch_size
    config = find_config(recipe, data.index)
    goal = plan_budget(
        recipe.train.budget, config, config.num_patches, per_step * config.num_patches
    ).flops
    torch.manual_seed(seed)
    torch.set_num_threads(1)
    model = MODELS[name](config.image_shape[0], config.num_channels, config.num_labels or 0)
    example = 3 * count_flops(model, data.samples[0]["pixel_values"][None])
    own_steps = round(goal / (example * per_step))
    section = recipe.train.model_copy(update={"learning_rate": rate})
    began = time.process_time()
    fit(model, data.samples, section, own_steps)
    line = {"family": family, "model": name, "learning_rate": rate, "seed": seed}
    line |= {"parameters": sum(one.numel() for one in model.parameters()), "steps": own_steps}
    line |= {"train_flops": float(example * per_step * own_steps), "flops_per_example": example / 3}
    folder = data.index.directory
    line |= {
        split: accuracy(model, MediaDataset(folder, split)) for split in ("validation", "test")
    }
    line["cpu_s"] = round(time.process_time() - began, 1)
    print(json.dumps(line), flush=True)
    return line | provenance(None)


def count_flops(model: nn.Module, pixels: Tensor) -> int:
    """Of one example forward: 2 per multiplication."""
    model.eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(pixels)
    return int(counter.get_total_flops())


def fit(model: nn.Module, samples: Any, section: TrainSection, steps: int) -> None:
    """Train by the recipe's optimiser and schedule."""
    model.train()
    warmup, decay = trapezoid(section, steps)
    adamw = torch.optim.AdamW(
        group_parameters(model, section, []),
        lr=section.learning_rate,
        betas=(section.adam_beta1, section.adam_beta2),
        fused=True,
    )
    whole = samples.take(steps * section.batch_size)
    for step, batch in enumerate(load_batches(whole, section.batch_size, first=0)):
        for group in adamw.param_groups:
            group["lr"] = section.learning_rate * rate_factor(step, steps, warmup, decay)
        F.cross_entropy(model(batch["pixel_values"]), batch["labels"]).backward()
        nn.utils.clip_grad_norm_(model.parameters(), section.max_grad_norm)
        adamw.step()
        adamw.zero_grad()


@torch.no_grad()
def accuracy(model: nn.Module, dataset: MediaDataset) -> float:
    """Share of right answers."""
    model.eval()
    right = 0
    for start in range(0, len(dataset), 256):
        batch = collate_media([dataset[i] for i in range(start, min(start + 256, len(dataset)))])
        right += int((model(batch["pixel_values"]).argmax(-1) == batch["labels"]).sum())
    return right / len(dataset)


def main() -> None:
    """Train what has no line yet, then print all lines of the family."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("family", help="image/animals or image/digits")
    parser.add_argument("--steps", type=int, required=True, help="of the recursive row")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=len(GRID), help="so many of the grid")
    parser.add_argument("--records", type=Path, default=RECORDS)
    parser.add_argument("--set", action="append", default=[], help="a field of the recipe")
    given = parser.parse_args()
    there = {
        (line["family"], line["model"], line["learning_rate"], line["seed"])
        for line in read(given.records)
    }
    for name, rate in GRID[: given.first]:
        if (given.family, name, rate, given.seed) not in there:
            line = run_one(given.family, name, rate, given.steps, given.seed, given.set)
            append_jsonl(given.records, line)
    print("| model | learning rate | weights | steps | FLOPs of an example | validation | test |")
    print("|---|" + "---:|" * 6)
    for one in read(given.records):
        if one["family"] == given.family:
            print(
                f"| {one['model']} | {one['learning_rate']:g} | {one['parameters']:,} "
                f"| {one['steps']:,} | {one['flops_per_example']:.3g} "
                f"| {one['validation']:.2%} | {one['test']:.2%} |"
            )


if __name__ == "__main__":
    main()
