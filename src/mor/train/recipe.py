"""Recipes: one YAML file says what to train, on what, for how long. Validated before anything runs.

    name: mor-threshold
    model: {num_recursions: 3, num_recursion_layers: 2, router: threshold}
    data: {path: data/shakespeare, seq_len: 256}
    train: {budget: {flops: 5.0e13}, batch_size: 8, learning_rate: 3.0e-3}

``model`` takes every field of :class:`mor.config.MoRConfig`, or ``preset`` and ``family`` with
fields on top. ``num_hidden_layers``, the unrolled depth, may stand for ``num_recursion_layers``:
twins of different ``num_recursions`` then differ in one word.
"""

from __future__ import annotations

import difflib
import inspect
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    create_model,
    field_validator,
    model_validator,
)

from mor.config import MoRConfig
from mor.errors import MorError
from mor.presets import FAMILIES, SHAPES, preset
from mor.train.reporters import known_reporters


class RecipeError(MorError, ValueError):
    """A recipe cannot be run; the message names the field and says what would be right."""


class _Section(BaseModel):
    # Strict: `batch_size: true` is a slip, not 1. Numbers are read by `mor.train.recipe_file`.
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


Folder = Annotated[Path, Field(strict=False)]


class Budget(_Section):
    """How long to train: exactly one of the three."""

    steps: int | None = Field(None, ge=1, description="optimiser steps")
    tokens: float | None = Field(None, gt=0, description="tokens seen, e.g. 20.0e9")
    flops: float | None = Field(None, gt=0, description="training FLOPs, forward and backward")

    @model_validator(mode="after")
    def _one(self) -> Budget:
        given = [name for name in ("steps", "tokens", "flops") if getattr(self, name) is not None]
        if len(given) != 1:
            shown = " and ".join(f"{name}={getattr(self, name)!r}" for name in given) or "none"
            raise ValueError(f"give exactly one of steps, tokens, flops; given: {shown}")
        return self


class MixturePart(_Section):
    """One folder of a mixture."""

    path: Folder = Field(description="folder made by `mor data prepare`")
    weight: float = Field(gt=0, description="its share, relative to the other weights")


class DataSection(_Section):
    """Where the prepared tokens are, and how they become sequences."""

    path: Folder | None = Field(None, description="folder made by `mor data prepare`")
    mixture: list[MixturePart] | None = Field(
        None, min_length=1, description="in place of path: several folders with weights"
    )
    seq_len: int = Field(512, ge=2, description="tokens per sequence")
    packing: Literal["concat", "best_fit"] = Field(
        "concat", description="cut the stream of documents, or fit whole documents and pad"
    )
    document_mask: bool = Field(False, description="no attention from one document to another")
    train_split: str = "train"
    validation_split: str = "validation"
    verify: bool = Field(False, description="check every byte of every shard before training")

    @model_validator(mode="after")
    def _one_source(self) -> DataSection:
        if (self.path is None) == (self.mixture is None):
            given = "both" if self.path is not None else "none"
            raise ValueError(f"give exactly one of path, mixture; given: {given}")
        return self

    @property
    def folders(self) -> list[tuple[Path, float]]:
        """Every folder with its weight."""
        if self.path is not None:
            return [(self.path, 1.0)]
        return [(part.path, part.weight) for part in self.mixture or ()]


class TrainSection(_Section):
    """Optimiser, schedule and bookkeeping; defaults are the paper's (AdamW, trapezoid)."""

    budget: Budget
    batch_size: int = Field(8, ge=1, description="sequences per device and micro-batch")
    gradient_accumulation_steps: int = Field(1, ge=1)
    global_batch_size: int | None = Field(
        None,
        ge=1,
        description="sequences per optimiser step over all devices; accumulation follows from it, "
        "so that a run is the same on any number of devices",
    )
    learning_rate: float = Field(3e-3, gt=0)
    adam_beta1: float = Field(0.9, ge=0, lt=1)
    adam_beta2: float = Field(0.95, ge=0, lt=1)
    adam_epsilon: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.1, ge=0)
    max_grad_norm: float = Field(1.0, gt=0)
    auxiliary_router_lr_factor: float = Field(10.0, gt=0, description="of the aux_router's rate")
    warmup_fraction: float = Field(0.05, ge=0, le=1, description="of all steps, linear from 0")
    warmup_steps: int | None = Field(None, ge=0, description="in place of warmup_fraction")
    decay_fraction: float = Field(0.2, ge=0, le=1, description="of all steps, linear to 0")
    dtype: Literal["float32", "bfloat16"] = "float32"
    gradient_checkpointing: bool = False
    compile: bool = Field(False, description="run the layers through torch.compile")
    parallel: Literal["ddp", "fsdp"] = Field(
        "ddp", description="several processes: whole weights on each, or shards of them (FSDP2)"
    )
    fsdp_regather: bool = Field(
        False,
        description="gather each layer anew for every pass through it, one layer whole at a time; "
        "False gathers once per optimiser step and keeps it for all recursions",
    )
    seed: int = Field(0, ge=0, lt=2**32)
    logging_steps: int = Field(10, ge=1)
    eval_steps: int | None = Field(None, ge=1, description="None: only after the last step")
    eval_sequences: int = Field(64, ge=1, description="validation sequences while training")
    save_steps: int | None = Field(None, ge=1, description="None: only when interrupted")
    save_total_limit: int = Field(2, ge=1, description="checkpoints kept")
    keep_every: int | None = Field(None, ge=1, description="save at its multiples, and keep those")
    keep_steps: list[int] = Field([], description="save after these steps, and keep those")
    branches: list[Budget] = Field([], description="shorter budgets, branched off this run")
    branch_from: Folder | None = Field(None, description="stable checkpoint of a run to go on from")
    num_workers: int = Field(0, ge=0)
    threads: int | None = Field(None, ge=1, description="CPU threads; None leaves torch's default")
    peak_flops: float | None = Field(
        None, gt=0, description="per second and device, for MFU; None: known by name, or measured"
    )
    report_to: list[str] | None = Field(
        None, description="wandb, mlflow, trackio, ...; None: tensorboard if installed"
    )

    @field_validator("report_to")
    @classmethod
    def _reporters(cls, names: list[str] | None) -> list[str] | None:
        known = known_reporters()
        for name in names or ():
            if name not in known:
                raise ValueError(f"{name!r} is no reporter of the Trainer{suggest(name, known)}")
        return names

    def saves_at(self, step: int) -> bool:
        """Whether the checkpoint after ``step`` is wanted for good."""
        return step in self.keep_steps or (
            self.keep_every is not None and step % self.keep_every == 0
        )

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


class Recipe(_Section):
    """One training run."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    model: dict[str, Any] = Field(default_factory=dict)
    data: DataSection
    train: TrainSection
    output: Folder = Field(Path("runs"), description="parent of the run's folder")

    @property
    def run_dir(self) -> Path:
        """Folder of this run: ``output / name``."""
        return self.output.expanduser() / self.name

    def sequences_per_step(self, world_size: int = 1) -> int:
        """Sequences of one optimiser step over all devices and micro-batches."""
        return self.train.batch_size * self.train.accumulation(world_size) * world_size

    def model_config_for(self, vocab_size: int, eos_token_id: int | None) -> MoRConfig:
        """The network, with the vocabulary of the data unless the recipe names its own.

        Raises:
            RecipeError: an unknown field, a wrong value, or a vocabulary smaller than the data's.
        """
        fields = dict(self.model)
        named, family = fields.pop("preset", None), fields.pop("family", "mor")
        of_data = {
            "vocab_size": vocab_size,
            "bos_token_id": eos_token_id,
            "eos_token_id": eos_token_id,
        }
        room = {} if named else {"max_position_embeddings": max(2048, self.data.seq_len)}
        fields = of_data | room | fields
        try:
            config = preset(named, family, **fields) if named else MoRConfig(**fields)
        except MorError as error:
            raise RecipeError(f"model.{error}") from None
        if config.vocab_size < vocab_size:
            raise RecipeError(
                f"model.vocab_size={config.vocab_size} is smaller than the data's {vocab_size}; "
                "leave it out to take the data's"
            )
        if self.data.seq_len > config.max_position_embeddings:
            raise RecipeError(
                f"data.seq_len={self.data.seq_len} is longer than model.max_position_embeddings="
                f"{config.max_position_embeddings}; shorten the one or raise the other"
            )
        return config


def _model_section() -> type[BaseModel]:
    """What ``model`` may hold: the parameters of MoRConfig with their types, and the presets."""
    hints = get_type_hints(MoRConfig.__init__)
    parameters = inspect.signature(MoRConfig.__init__).parameters.values()
    fields: dict[str, Any] = {
        p.name: (hints[p.name], None)
        for p in parameters
        if p.name != "self" and p.kind is not p.VAR_KEYWORD
    }
    positive = {"num_recursions": int, "initializer_range": float, "rms_norm_eps": float}
    fields |= {name: (Annotated[kind, Field(gt=0)], None) for name, kind in positive.items()}
    fields["preset"] = (Literal[tuple(SHAPES)], None)
    fields["family"] = (Literal[FAMILIES], None)
    return create_model("ModelSection", __base__=_Section, **fields)


_MODEL_SECTION = _model_section()


def _fields_at(location: tuple[Any, ...]) -> list[str]:
    """Names that may stand beside the last part of ``location``."""
    section: Any = Recipe
    for part in location[:-1]:
        if part == "mixture":
            section = MixturePart
        elif not isinstance(part, int):  # a number is a place in a list
            section = _MODEL_SECTION if part == "model" else section.model_fields[part].annotation
    return list(section.model_fields)


def suggest(word: str, known: list[str]) -> str:
    """``; did you mean 'x'?`` or the list of what there is."""
    close = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(sorted(known))}"


def _problems(section: type[BaseModel], raw: Any, prefix: tuple[str, ...] = ()) -> list[str]:
    """Every wrong field of ``raw``: its path, its value, what would be right."""
    try:
        section.model_validate(raw)
    except ValidationError as error:
        found = []
        for item in error.errors(include_url=False):
            location = prefix + item["loc"]
            where = ".".join(str(part) for part in location) or "recipe"
            if item["type"] == "extra_forbidden":
                hint = suggest(str(location[-1]), _fields_at(location))
                found.append(f"{where} is not a field{hint}")
            elif item["type"] == "missing":
                found.append(f"{where} is missing")
            else:
                text = item["msg"].removeprefix("Value error, ")
                shown = "" if isinstance(item["input"], dict) else f"={item['input']!r}"
                found.append(f"{where}{shown}: {text[0].lower()}{text[1:]}")
        return found
    return []


def parse_recipe(raw: Any, source: str = "recipe") -> Recipe:
    """Validate a mapping. ``parse_recipe(recipe.model_dump())`` gives the same recipe again.

    Raises:
        RecipeError: naming every wrong field, its value and what would be right.
    """
    if not isinstance(raw, dict):
        raise RecipeError(f"{source} must hold a mapping of name, model, data, train")
    problems = _problems(Recipe, raw)
    model = raw.get("model", {})
    if isinstance(model, dict):
        problems += _problems(_MODEL_SECTION, model, ("model",))
        if "family" in model and "preset" not in model:
            problems.append(
                f"model.family={model['family']!r} belongs to model.preset; without a preset, "
                "num_recursions and router decide"
            )
    if problems:
        raise RecipeError(f"{source}: " + "; ".join(problems))
    recipe = Recipe.model_validate(raw)
    try:
        # The data's vocabulary is not known yet; everything else about the network is.
        recipe.model_config_for(recipe.model.get("vocab_size", 2**30), None)
    except RecipeError as error:
        raise RecipeError(f"{source}: {error}") from None
    return recipe
