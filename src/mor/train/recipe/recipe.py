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

from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import (
    BaseModel,
    Field,
    ValidationError,
    create_model,
)

from mor.config import MoRConfig, field_types
from mor.config.presets import FAMILIES, SHAPES, preset
from mor.data.bos import Bos
from mor.errors import MorError
from mor.train.recipe.fields import decides
from mor.train.recipe.sections import (
    DataSection,
    Folder,
    RecipeError,
    Section,
    TrainSection,
    suggest,
)
from mor.train.recipe.uptrain import UptrainSection


class Recipe(Section):
    """One training run."""

    name: str = decides("nothing", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    model: dict[str, Any] = decides("weights and speed", default_factory=dict)
    data: DataSection = decides("weights and speed")
    train: TrainSection = decides("weights and speed")
    uptrain: UptrainSection | None = decides(
        "weights and speed", None, description="train on from a model that is there"
    )
    output: Folder = decides("nothing", Path("runs"), description="parent of the run's folder")

    @property
    def run_dir(self) -> Path:
        """Folder of this run: ``output / name``."""
        return self.output.expanduser() / self.name

    def sequences_per_step(self, world_size: int = 1) -> int:
        """Sequences of one optimiser step over all devices and micro-batches."""
        return self.train.batch_size * self.train.accumulation(world_size) * world_size

    def check_media_model(self) -> None:
        """Refuse wrong fields of a model of images or sounds; what the data says is left open.

        Raises:
            RecipeError: naming the field.
        """
        fields = {name: value for name, value in self.model.items() if value is not None}
        patch = fields.get("patch_size", 1)
        image, captions = self.data.kind == "images", self.data.kind == "captions"
        # Any size that the patches divide will do until the data is looked at.
        stand_in: dict[str, Any] = {"modality": "image", "image_size": patch, "patch_size": patch}
        if captions and "patch_size" in fields:
            stand_in |= {"modality": "text", "image_token_id": 0}
        elif captions:  # of sounds; if the folder holds images, patch_size is asked for then
            stand_in = {"modality": "text", "audio_token_id": 0, "num_mel_bins": 1}
        elif not image:
            stand_in = {"modality": "audio", "num_mel_bins": 1}
        if image and "patch_size" not in fields:
            raise RecipeError("model.patch_size is missing: pixels of a patch, one side or both")
        for name in ("preset", "family"):
            if name in fields:
                raise RecipeError(
                    f"model.{name}={fields[name]!r} is of texts; for data.kind="
                    f"{self.data.kind!r} give the widths"
                )
        try:
            MoRConfig(**(stand_in | fields))
        except MorError as error:
            raise RecipeError(f"model.{error}") from None

    def model_config_for(
        self, vocab_size: int, eos_token_id: int | None, bos: Bos | None = None
    ) -> MoRConfig:
        """The network, with the vocabulary of the data unless the recipe names its own.

        Args:
            vocab_size, eos_token_id: of the data.
            bos: what its documents begin with (`DataIndex.known_bos`); None where no data is at
                hand: then nothing is said of it, and the one token named stands for both.

        Raises:
            RecipeError: an unknown field, a wrong value, a vocabulary smaller than the data's, or
                texts that begin otherwise than the data's documents.
        """
        fields = dict(self.model)
        if fields.get("add_bos_token") is None:
            fields.pop("add_bos_token", None)
        named, family = fields.pop("preset", None), fields.pop("family", "mor")
        of_data = {
            "vocab_size": vocab_size,
            "bos_token_id": eos_token_id if bos is None else bos.token,
            "eos_token_id": eos_token_id,
        }
        if bos is not None:
            of_data["add_bos_token"] = bool(bos.added)
            # Models of earlier programs name another token there, such as the end of text.
            early = self.uptrain is not None or fields.get("bos_token_id") == eos_token_id
            if early and "add_bos_token" not in fields and bos.token is not None:
                fields["bos_token_id"] = bos.token
        room = {} if named else {"max_position_embeddings": max(2048, self.data.seq_len)}
        fields = of_data | room | fields
        try:
            config = preset(named, family, **fields) if named else MoRConfig(**fields)
        except MorError as error:
            raise RecipeError(f"model.{error}") from None
        schedule = self.train.depth_schedule
        deepest = max((cap for _, cap in schedule), default=1) if isinstance(schedule, list) else 1
        if deepest > config.num_recursions:
            raise RecipeError(
                f"train.depth_schedule caps depth at {deepest}; model.num_recursions="
                f"{config.num_recursions} allows 1 to {config.num_recursions}"
            )
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
        if bos is not None and Bos(config.bos_token_id, config.add_bos_token).start != bos.start:
            ours = Bos(config.bos_token_id, config.add_bos_token)
            raise RecipeError(
                f"model.add_bos_token={config.add_bos_token}: the model begins every text "
                f"{ours.describe()}, but the data was prepared {bos.describe()}; prepare the text "
                f"again with --bos {'always' if ours.start else 'never'}, or set "
                f"model.add_bos_token={'true' if bos.start else 'false'} to train a model that "
                "reads texts as the data"
            )
        return config


def _model_section() -> type[BaseModel]:
    """What ``model`` may hold: the parameters of MoRConfig with their types, and the presets."""
    types = field_types() | {"num_hidden_layers": int | None}
    fields: dict[str, Any] = {name: (kind, None) for name, kind in types.items()}
    positive = {"num_recursions": int, "initializer_range": float, "rms_norm_eps": float}
    fields |= {name: (Annotated[kind, Field(gt=0)], None) for name, kind in positive.items()}
    fields["preset"] = (Literal[tuple(SHAPES)], None)
    fields["family"] = (Literal[FAMILIES], None)
    return create_model("ModelSection", __base__=Section, **fields)


_MODEL_SECTION = _model_section()


def _fields_at(location: tuple[Any, ...]) -> list[str]:
    """Names that may stand beside the last part of ``location``."""
    section: Any = Recipe
    for part in location[:-1]:
        if not isinstance(part, int):  # a number is a place in a list
            kind = section.model_fields[part].annotation
            section = _MODEL_SECTION if part == "model" else _section_in(kind)
    return list(section.model_fields)


def _section_in(kind: Any) -> Any:
    """The section that a field holds, be it optional or one of a list."""
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return kind
    found = (_section_in(part) for part in get_args(kind))
    return next((section for section in found if section is not None), None)


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
    if recipe.uptrain is not None and "num_recursions" not in recipe.model:
        return recipe  # the start's configuration is still to come: see `resolve_model`
    try:
        if recipe.data.kind != "text":
            recipe.check_media_model()
            return recipe
        # The data's vocabulary is not known yet; everything else about the network is.
        bos = Bos(recipe.model.get("bos_token_id") or 0, recipe.model.get("add_bos_token"))
        recipe.model_config_for(recipe.model.get("vocab_size", 2**30), None, bos)
    except RecipeError as error:
        raise RecipeError(f"{source}: {error}") from None
    return recipe
