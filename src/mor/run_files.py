"""The names in a run folder, and where a model's files are.

RUN/recipe.yaml       the recipe, every default written out
RUN/log.jsonl         one line per log entry
RUN/checkpoints/      checkpoint-N (mor.train.state.checkpoints)
RUN/tensorboard/      where TensorBoard is installed
RUN/model/            for ``from_pretrained``, tokenizer included; there once the run is finished
RUN/summary.json      written last
RUN/eval.json         what ``mor eval`` and ``mor demo`` found

Wherever a model folder is asked for, a run folder will do: its ``model`` is meant then. So will the
name of a model that ships in the package (:data:`SHIPPED`), where no such folder exists.
Standard library only: this module lies on the lowest floor.
"""

from __future__ import annotations

import json
from pathlib import Path

from mor.errors import MorError, describe_missing

RECIPE, LOG, SUMMARY, EVAL = "recipe.yaml", "log.jsonl", "summary.json", "eval.json"
MODEL, CHECKPOINTS, TENSORBOARD = "model", "checkpoints", "tensorboard"
CONFIG, TOKENIZER = "config.json", "tokenizer_config.json"
ADAPTER, PROCESSOR = "adapter_config.json", "preprocessor_config.json"
# What makes inputs of images and sounds; the second where text goes with them.
PROCESSORS = (PROCESSOR, "processor_config.json")
SHIPPED = Path(__file__).resolve().parent / "shipped"
DEFAULT_MODEL = Path("prose")
"""The shipped model that ``mor generate``, ``serve`` and ``eval`` take where none is named."""
HELD_OUT = "held-out"
"""Beside a shipped model: a prepared folder of text that the model was not trained on."""


def shipped_models() -> list[str]:
    """The names of the models that ship in the package."""
    return sorted(path.parent.name for path in SHIPPED.glob(f"*/{CONFIG}"))


def find_folder(path: Path) -> Path:
    """``path``, or the folder of the shipped model of that name where ``path`` does not exist."""
    path = path.expanduser()
    shipped = len(path.parts) == 1 and not path.exists() and path.name in shipped_models()
    return SHIPPED / path.name if shipped else path


def model_folder(path: Path) -> Path:
    """``path`` if it is a model folder or, for a run folder, its ``model``.

    Raises:
        MorError: there is no such folder, no model in it, or the model is not one of ours.
    """
    path = find_folder(path)
    if not path.is_dir():
        raise MorError(f"model folder {str(path)!r} {describe_missing(path)}")
    config = beside_model(path, CONFIG)
    if config is None:
        refuse_adapter(path)
        raise MorError(
            f"{path} is no model folder: {CONFIG} is missing; nor is it that of a finished run"
        )
    try:
        kind = json.loads(config.read_text(encoding="utf-8")).get("model_type")
    except (OSError, ValueError, AttributeError):
        raise MorError(
            f"{config} is not a JSON object; the checkpoint is damaged: it names no model_type"
        ) from None
    if kind != "mor":
        raise MorError(
            f"{config} has model_type={kind!r}, not 'mor'; convert it first: "
            f"mor convert llama {config.parent} --out DIR"
        )
    return config.parent


def refuse_adapter(path: Path) -> None:
    """Say so where ``path`` is a PEFT adapter alone and a whole model is wanted.

    Raises:
        MorError: it is one, with what makes a model folder of it.
    """
    adapter = beside_model(path, ADAPTER)
    if adapter is not None and beside_model(path, CONFIG) is None:
        raise MorError(_adapter(adapter))


def _adapter(config: Path) -> str:
    """What to say to somebody who gives a PEFT adapter for a model."""
    try:
        told = json.loads(config.read_text(encoding="utf-8"))
        kind, base = told.get("peft_type"), told.get("base_model_name_or_path")
    except (OSError, ValueError, AttributeError):
        kind = base = None
    return (
        f"{config.parent} is a PEFT adapter ({kind}) of {base!r} and no model folder; merge it "
        f"first: PeftModel.from_pretrained(MODEL, {str(config.parent)!r}).merge_and_unload()"
        ".save_pretrained(DIR), MODEL being that model loaded"
    )


def beside_model(path: Path, name: str) -> Path | None:
    """The file ``name`` of a model folder or of a run folder's model; None where there is none."""
    path = find_folder(path)
    places = (path / name, path / MODEL / name)
    return next((place for place in places if place.is_file()), None)
