"""Recipes: one YAML file says what to train, on what, for how long. Validated before anything runs.

    name: mor-threshold
    model: {num_recursions: 3, num_recursion_layers: 2, router: threshold}
    data: {path: data/shakespeare, seq_len: 256}
    train: {budget: {flops: 5.0e13}, batch_size: 8, learning_rate: 3.0e-3}

``model`` takes every field of :class:`mor.config.MoRConfig`, or ``preset`` and ``family`` with
fields on top.
"""

from __future__ import annotations

import difflib
import inspect
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from mor.config import MoRConfig
from mor.errors import MorError
from mor.presets import preset


_BUILTIN = Path(__file__).resolve().parent.parent / "recipes"


class RecipeError(MorError, ValueError):
    """A recipe cannot be run; the message names the field and says what would be right."""


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=False)


class Budget(_Section):
    """How long to train: exactly one of the three."""

    steps: int | None = Field(None, ge=1, description="optimiser steps")
    tokens: float | None = Field(None, gt=0, description="tokens seen, e.g. 20.0e9")
    flops: float | None = Field(None, gt=0, description="training FLOPs, forward and backward")

    @model_validator(mode="after")
    def _one(self) -> Budget:
        given = [name for name in ("steps", "tokens", "flops") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"give exactly one of steps, tokens, flops (given: {given or 'none'})")
        return self


class DataSection(_Section):
    """Where the prepared tokens are."""

    path: Path = Field(description="folder made by `mor data prepare`")
    seq_len: int = Field(512, ge=2, description="tokens per sequence")
    train_split: str = "train"
    validation_split: str = "validation"


class TrainSection(_Section):
    """Optimiser, schedule and bookkeeping; defaults are the paper's (AdamW, trapezoid)."""

    budget: Budget
    batch_size: int = Field(8, ge=1, description="sequences per device and micro-batch")
    gradient_accumulation_steps: int = Field(1, ge=1)
    learning_rate: float = Field(3e-3, gt=0)
    adam_beta1: float = Field(0.9, ge=0, lt=1)
    adam_beta2: float = Field(0.95, ge=0, lt=1)
    adam_epsilon: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.1, ge=0)
    max_grad_norm: float = Field(1.0, gt=0)
    auxiliary_router_lr_factor: float = Field(10.0, gt=0, description="of the aux_router's rate")
    warmup_fraction: float = Field(0.05, ge=0, le=1, description="of all steps, linear from 0")
    decay_fraction: float = Field(0.2, ge=0, le=1, description="of all steps, linear to 0")
    dtype: Literal["float32", "bfloat16"] = "float32"
    gradient_checkpointing: bool = False
    seed: int = Field(0, ge=0)
    logging_steps: int = Field(10, ge=1)
    eval_steps: int | None = Field(None, ge=1, description="None: only at the end")
    eval_sequences: int = Field(64, ge=1, description="validation sequences while training")
    save_steps: int | None = Field(None, ge=1, description="None: only at the end")
    save_total_limit: int = Field(2, ge=1)
    num_workers: int = Field(0, ge=0)
    threads: int | None = Field(None, ge=1, description="CPU threads; None leaves torch's default")
    report_to: list[str] | None = Field(None, description="None: tensorboard if installed")

    @model_validator(mode="after")
    def _schedule(self) -> TrainSection:
        if self.warmup_fraction + self.decay_fraction > 1:
            raise ValueError(
                f"warmup_fraction={self.warmup_fraction} and decay_fraction={self.decay_fraction} "
                "must add up to at most 1"
            )
        return self


class Recipe(_Section):
    """One training run."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    model: dict[str, Any] = Field(default_factory=dict)
    data: DataSection
    train: TrainSection
    output: Path = Field(Path("runs"), description="parent of the run's folder")

    @property
    def run_dir(self) -> Path:
        """Folder of this run: ``output / name``."""
        return self.output / self.name

    def model_config_for(self, vocab_size: int, eos_token_id: int | None) -> MoRConfig:
        """The network, with the vocabulary of the data unless the recipe names its own.

        Raises:
            RecipeError: an unknown field, a wrong value, or a vocabulary smaller than the data's.
        """
        fields = dict(self.model)
        named = fields.pop("preset", None)
        family = fields.pop("family", "mor")
        defaults = {
            "bos_token_id": eos_token_id,
            "eos_token_id": eos_token_id,
            "vocab_size": vocab_size,
            "max_position_embeddings": max(2048, self.data.seq_len),
        }
        fields = (fields if named else defaults | fields) | (
            {"vocab_size": fields.get("vocab_size", vocab_size)}
        )
        try:
            config = preset(named, family, **fields) if named else MoRConfig(**fields)
        except MorError as error:
            raise RecipeError(f"model.{error}") from None
        if config.vocab_size < vocab_size:
            raise RecipeError(
                f"model.vocab_size={config.vocab_size} is smaller than the data's {vocab_size}"
            )
        if self.data.seq_len > config.max_position_embeddings:
            raise RecipeError(
                f"data.seq_len={self.data.seq_len} is longer than model.max_position_embeddings="
                f"{config.max_position_embeddings}"
            )
        return config


def _suggest(word: str, known: list[str]) -> str:
    close = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(sorted(known))}"


def _known(location: tuple[Any, ...]) -> list[str]:
    section: Any = Recipe
    for part in location[:-1]:
        section = section.model_fields[part].annotation
    return list(section.model_fields)


def _check_model_fields(model: dict[str, Any]) -> None:
    known = [
        name
        for name, p in inspect.signature(MoRConfig.__init__).parameters.items()
        if name != "self" and p.kind is not p.VAR_KEYWORD
    ]
    for name, value in model.items():
        if name in ("preset", "family"):
            continue
        if name not in known:
            raise RecipeError(f"model.{name} is not a field{_suggest(name, known)}")
        annotation = str(inspect.signature(MoRConfig.__init__).parameters[name].annotation)
        wants_number = annotation in ("int", "float", "int | None", "float | None")
        if wants_number and value is not None and not _is_number(value, "float" in annotation):
            raise RecipeError(f"model.{name}={value!r} must be of type {annotation}")
        if annotation == "bool" and not isinstance(value, bool):
            raise RecipeError(f"model.{name}={value!r} must be true or false")


def _is_number(value: Any, fraction: bool) -> bool:
    return isinstance(value, (int, float) if fraction else int) and not isinstance(value, bool)


def parse_recipe(raw: Any, source: str = "recipe") -> Recipe:
    """Validate a mapping.

    Raises:
        RecipeError: naming every wrong field, its value and what would be right.
    """
    if not isinstance(raw, dict):
        raise RecipeError(f"{source} must hold a mapping of name, model, data, train")
    try:
        recipe = Recipe.model_validate(raw)
    except ValidationError as error:
        problems = []
        for item in error.errors():
            where = ".".join(str(part) for part in item["loc"]) or "recipe"
            if item["type"] == "extra_forbidden":
                known = _known(item["loc"])
                problems.append(f"{where} is not a field{_suggest(str(item['loc'][-1]), known)}")
            elif item["type"] == "missing":
                problems.append(f"{where} is missing")
            else:
                text = item["msg"].removeprefix("Value error, ")
                shown = "" if isinstance(item["input"], dict) else f"={item['input']!r}"
                problems.append(f"{where}{shown}: {text[0].lower()}{text[1:]}")
        raise RecipeError(f"{source}: " + "; ".join(problems)) from None
    _check_model_fields(recipe.model)
    return recipe


def apply_overrides(raw: dict[str, Any], overrides: list[str]) -> dict[str, Any]:
    """Set ``a.b=value`` entries (values read as YAML) on a copy of ``raw``.

    Raises:
        RecipeError: an entry without ``=``, or a path through something that is no section.
    """
    result = yaml.safe_load(yaml.safe_dump(raw)) or {}
    for entry in overrides:
        path, equals, text = entry.partition("=")
        if not equals or not path:
            raise RecipeError(f"--set {entry!r} must look like train.learning_rate=1e-3")
        *parents, leaf = path.split(".")
        section = result
        for part in parents:
            section = section.setdefault(part, {})
            if not isinstance(section, dict):
                raise RecipeError(f"--set {entry!r}: {part!r} is a value, not a section")
        if path.startswith("train.budget."):
            section.clear()  # one budget replaces another
        section[leaf] = _yaml_value(text)
    return result


def _yaml_value(text: str) -> Any:
    value = yaml.safe_load(text)
    if isinstance(value, str):
        # YAML 1.1 reads 3e-3 as text; nobody who writes it means that.
        try:
            return float(value)
        except ValueError:
            return value
    return value


def builtin_recipes() -> list[str]:
    """Names of the recipes that come with mor, such as ``demo/threshold``."""
    return sorted(str(p.relative_to(_BUILTIN).with_suffix("")) for p in _BUILTIN.rglob("*.yaml"))


def load_recipe(source: str | Path, overrides: list[str] | None = None) -> Recipe:
    """Read a YAML recipe, or one that comes with mor by its name, and apply ``--set`` entries.

    Raises:
        RecipeError: no such recipe, not YAML, or a wrong field.
    """
    path = Path(source)
    if not path.is_file() and str(source) in builtin_recipes():
        path = _BUILTIN / f"{source}.yaml"
    if not path.is_file():
        close = difflib.get_close_matches(str(source), builtin_recipes(), n=1)
        hint = f"; did you mean {close[0]}?" if close else " (mor recipes lists what comes along)"
        raise RecipeError(f"recipe {str(source)!r} does not exist{hint}")
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        line = " ".join(str(error).split())
        raise RecipeError(f"{path} is not YAML: {line}") from None
    if not isinstance(raw, dict):
        raise RecipeError(f"{path} must hold a mapping of name, model, data, train")
    return parse_recipe(apply_overrides(raw, overrides or []), str(path))
