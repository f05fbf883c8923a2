"""The sections of a recipe: budget, data, training. Every field with its default and its check."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import field_validator, model_validator

from mor.train.recipe.base import Folder, RecipeError, Section, suggest
from mor.train.recipe.depth import DepthParts, RouteByLossSection
from mor.train.recipe.fields import decides
from mor.train.recipe.media import AugmentSection
from mor.train.recipe.reporters import known_reporters


class Budget(Section):
    """How long to train: exactly one of the three."""

    steps: int | None = decides("length", None, ge=1, description="optimiser steps")
    tokens: float | None = decides("length", None, gt=0, description="tokens seen, e.g. 20.0e9")
    flops: float | None = decides(
        "length", None, gt=0, description="training FLOPs, forward and backward"
    )

    @model_validator(mode="after")
    def _one(self) -> Budget:
        given = [name for name in ("steps", "tokens", "flops") if getattr(self, name) is not None]
        if len(given) != 1:
            shown = " and ".join(f"{name}={getattr(self, name)!r}" for name in given) or "none"
            raise ValueError(f"give exactly one of steps, tokens, flops; given: {shown}")
        return self


class MixturePart(Section):
    """One folder of a mixture."""

    path: Folder = decides("nothing", description="folder made by `mor data prepare`")
    weight: float = decides(
        "weights and speed", gt=0, description="its share, relative to the other weights"
    )


_TEXTS_ALONE = {
    "mixture": None,
    "packing": "concat",
    "document_mask": False,
    "loss_on": "all",
    "validation_path": None,
}


class DataSection(Section):
    """Where the prepared tokens, images or sounds are, and how they become sequences."""

    kind: Literal["text", "images", "audio", "captions"] = decides(
        "weights and speed",
        "text",
        description="what the folder holds; captions: images or sounds, two of which make a "
        "picture or recording that the model says or answers something about",
    )
    augment: AugmentSection | None = decides(
        "weights", None, description="small changes of training images or sounds"
    )
    path: Folder | None = decides("nothing", None, description="folder made by `mor data prepare`")
    mixture: list[MixturePart] | None = decides(
        "weights and speed",
        None,
        min_length=1,
        description="in place of path: several folders with weights",
    )
    seq_len: int = decides("weights and speed", 512, ge=2, description="tokens per sequence")
    packing: Literal["concat", "best_fit"] = decides(
        "weights and speed",
        "concat",
        description="cut the stream of documents, or fit whole documents and pad",
    )
    document_mask: bool = decides(
        "weights and speed", False, description="no attention from one document to another"
    )
    loss_on: Literal["all", "answers"] = decides(
        "weights", "all", description="train on every token, or on the answers of a task alone"
    )
    train_split: str = decides("weights and speed", "train")
    validation_split: str = decides("weights", "validation")
    validation_path: Folder | None = decides(
        "nothing", None, description="score on this folder's validation split in place of one's own"
    )
    verify: bool = decides(
        "nothing", False, description="check every byte of every shard before training"
    )

    @model_validator(mode="after")
    def _one_source(self) -> DataSection:
        if (self.path is None) == (self.mixture is None):
            given = "both" if self.path is not None else "none"
            raise ValueError(f"give exactly one of path, mixture; given: {given}")
        if self.kind == "text" and self.augment is not None:
            raise ValueError("augment changes images and sounds; for kind='text' leave it out")
        if self.kind != "text":
            self._check_media()
        return self

    def _check_media(self) -> None:
        """Refuse what is for texts alone; ``seq_len`` follows from the data."""
        for name, plain in _TEXTS_ALONE.items():
            if getattr(self, name) != plain:
                raise ValueError(
                    f"{name}={getattr(self, name)!r} is for texts; for kind={self.kind!r} leave it "
                    "out"
                )
        if self.kind == "captions" and self.augment is not None and self.augment.flip:
            raise ValueError(
                "augment.flip=True exchanges left and right, which captions tell; leave it out"
            )

    @property
    def folders(self) -> list[tuple[Path, float]]:
        """Every folder with its weight."""
        if self.path is not None:
            return [(self.path, 1.0)]
        return [(part.path, part.weight) for part in self.mixture or ()]


class TrainSection(Section):
    """Optimiser, schedule and bookkeeping; defaults are the paper's (AdamW, trapezoid)."""

    budget: Budget = decides("length")
    batch_size: int = decides(
        "batch split", 8, ge=1, description="sequences per device and micro-batch"
    )
    gradient_accumulation_steps: int = decides("batch split", 1, ge=1)
    global_batch_size: int | None = decides(
        "weights and speed",
        None,
        ge=1,
        description="sequences per optimiser step over all devices; accumulation follows from it, "
        "so that a run is the same on any number of devices",
    )
    learning_rate: float = decides("optimiser", 3e-3, gt=0)
    adam_beta1: float = decides("optimiser", 0.9, ge=0, lt=1)
    adam_beta2: float = decides("optimiser", 0.95, ge=0, lt=1)
    adam_epsilon: float = decides("optimiser", 1e-8, gt=0)
    weight_decay: float = decides("optimiser", 0.1, ge=0)
    max_grad_norm: float = decides("optimiser", 1.0, gt=0)
    auxiliary_router_lr_factor: float = decides(
        "optimiser", 10.0, gt=0, description="of the rate of a router with its own loss"
    )
    warmup_fraction: float = decides(
        "length", 0.05, ge=0, le=1, description="of all steps, linear from 0"
    )
    warmup_steps: int | None = decides(
        "length", None, ge=0, description="in place of warmup_fraction"
    )
    decay_fraction: float = decides(
        "length", 0.2, ge=0, le=1, description="of all steps, linear to 0"
    )
    depth_schedule: DepthParts | None = decides(
        "weights and speed",
        None,
        description="depth cap by step: [share of steps, cap] in order, or random; None: no cap",
    )
    routing: Literal["causal", "topk", "full"] | None = decides(
        "weights and speed",
        None,
        description="rule that chooses depth: None, the router's selection for training; causal, "
        "its rule for decoding; full, every token runs every depth",
    )
    route_by_loss: RouteByLossSection | None = decides(
        "weights and speed",
        None,
        description="train router and trunk together, each token deeper while its loss is high",
    )
    dtype: Literal["float32", "bfloat16"] = decides("weights and speed", "float32")
    gradient_checkpointing: bool = decides("speed", False)
    compile: bool = decides("speed", False, description="run the layers through torch.compile")
    cuda_graphs: bool = decides("speed", False, description="on a GPU: steps as one graph")
    parallel: Literal["ddp", "fsdp"] = decides(
        "speed",
        "ddp",
        description="several processes: whole weights on each, or shards of them (FSDP2)",
    )
    fsdp_regather: bool = decides(
        "speed",
        False,
        description="gather each layer anew for every pass through it, one layer whole at a time; "
        "False gathers once per optimiser step and keeps it for all recursions",
    )
    seed: int = decides("weights", 0, ge=0, lt=2**32)
    logging_steps: int = decides("nothing", 10, ge=1)
    eval_steps: int | None = decides(
        "nothing", None, ge=1, description="None: only after the last step"
    )
    eval_sequences: int = decides(
        "nothing", 64, ge=1, description="validation sequences while training, spread evenly"
    )
    save_steps: int | None = decides(
        "nothing", None, ge=1, description="None: only when interrupted"
    )
    save_total_limit: int = decides("nothing", 2, ge=1, description="checkpoints kept")
    keep_every: int | None = decides(
        "nothing", None, ge=1, description="save at its multiples, and keep those"
    )
    keep_steps: list[int] = decides(
        "nothing", [], description="save after these steps, and keep those"
    )
    branches: list[Budget] = decides(
        "length", [], description="shorter budgets, branched off this run"
    )
    branch_from: Folder | None = decides(
        "length", None, description="stable checkpoint of a run to go on from"
    )
    num_workers: int = decides("speed", 0, ge=0)
    threads: int | None = decides(
        "speed", None, ge=1, description="CPU threads; None leaves torch's default"
    )
    peak_flops: float | None = decides(
        "nothing",
        None,
        gt=0,
        description="per second and device, for MFU; None: known by name, or measured",
    )
    report_to: list[str] | None = decides(
        "nothing",
        None,
        description="wandb, mlflow, ..., one or a list; None: tensorboard if installed",
    )

    @field_validator("report_to")
    @classmethod
    def _reporters(cls, names: list[str] | None) -> list[str] | None:
        if names == ["none"]:  # Transformers' word for it
            return []
        known = known_reporters()
        for name in names or ():
            if name not in known:
                raise ValueError(f"{name!r} is no reporter{suggest(name, known)}")
        return names

    def saves_at(self, step: int) -> bool:
        """Whether the checkpoint after ``step`` is wanted for good."""
        return step in self.keep_steps or (
            self.keep_every is not None and step % self.keep_every == 0
        )

    @field_validator("depth_schedule")
    @classmethod
    def _whole_run(cls, parts: DepthParts | None) -> DepthParts | None:
        if isinstance(parts, list):
            total = sum(share for share, _ in parts)
            if abs(total - 1) > 1e-6:
                raise ValueError(f"the shares add up to {total:g}; they must add up to 1")
        return parts

    @model_validator(mode="after")
    def _schedule(self) -> TrainSection:
        if self.warmup_fraction + self.decay_fraction > 1:
            raise ValueError(
                f"warmup_fraction={self.warmup_fraction} and decay_fraction={self.decay_fraction} "
                "must add up to at most 1"
            )
        if self.branches and self.branch_from is not None:
            raise ValueError(
                f"branch_from={str(self.branch_from)!r} and branches exclude each other; "
                "branches are taken from the run that the recipe itself trains"
            )
        return self

    @model_validator(mode="after")
    def _devices(self) -> TrainSection:
        if self.fsdp_regather and self.parallel != "fsdp":
            raise ValueError(
                f"fsdp_regather=True belongs to parallel='fsdp', not {self.parallel!r}"
            )
        if self.global_batch_size is not None and self.gradient_accumulation_steps != 1:
            raise ValueError(
                f"give global_batch_size={self.global_batch_size} or gradient_accumulation_steps="
                f"{self.gradient_accumulation_steps}, not both: the one follows from the other"
            )
        return self

    def accumulation(self, world_size: int = 1) -> int:
        """Micro-batches per optimiser step on each device.

        Raises:
            RecipeError: ``global_batch_size`` is no multiple of what one micro-batch takes.
        """
        if self.global_batch_size is None:
            return self.gradient_accumulation_steps
        at_once = self.batch_size * world_size
        steps, left = divmod(self.global_batch_size, at_once)
        if left or not steps:
            raise RecipeError(
                f"train.global_batch_size={self.global_batch_size} is no multiple of "
                f"train.batch_size={self.batch_size} x {world_size} processes; "
                f"use a batch_size that divides it, or {max(1, steps) * at_once}"
            )
        return steps
