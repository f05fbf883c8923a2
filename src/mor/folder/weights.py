"""Reading weight files, ours and those of others: each mistake named."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from mor.errors import MorError, describe_missing
from mor.ops.alignment import aligned

WEIGHT_NAMES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)


class ConversionError(MorError, ValueError):
    """A checkpoint cannot be read or converted; the message names the file and what is wrong."""


def one_line(error: BaseException, most: int | None = None) -> str:
    """The message of a library's error on one line of at most so many characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if most is None or len(text) <= most else text[: most - 3] + "..."


def read_mapping(path: Path) -> dict[str, Any]:
    """A JSON or YAML file (by its ending) that holds a mapping.

    Raises:
        ConversionError: no such file, broken syntax, or something else than a mapping.
    """
    is_yaml = path.suffix in (".yaml", ".yml")
    try:
        text = path.read_text("utf-8")
        content = yaml.safe_load(text) if is_yaml else json.loads(text)
    except OSError as error:
        raise ConversionError(f"{path}: cannot read the configuration: {error.strerror}") from error
    except (ValueError, yaml.YAMLError) as error:
        kind = "YAML" if is_yaml else "JSON"
        raise ConversionError(f"{path}: not valid {kind}: {one_line(error)}") from error
    if not isinstance(content, dict):
        raise ConversionError(
            f"{path}: holds a {type(content).__name__}; expected a mapping of fields"
        )
    return content


def find_weights(path: Path) -> Path:
    """The weight file (or index of shards) that ``path`` is or, for a folder, holds.

    Raises:
        ConversionError: there is none.
    """
    if path.is_dir():
        for name in WEIGHT_NAMES:
            if (path / name).is_file():
                return path / name
        raise ConversionError(f"{path}: no weights here; expected one of {', '.join(WEIGHT_NAMES)}")
    if not path.is_file():
        raise ConversionError(f"{path} {describe_missing(path, 'file')}")
    return path


def read_weights(path: Path) -> dict[str, Tensor]:
    """All tensors by name, from ``.safetensors``, ``.bin`` or an index of either, or a folder.

    They lie in aligned memory (:mod:`mor.ops.alignment`).

    Raises:
        ConversionError: a file is missing, cut short, or not a weight file.
    """
    path = find_weights(path)
    if not path.name.endswith(".index.json"):
        return _read_file(path)
    shards = read_mapping(path).get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(n, str) for n in shards.values()):
        raise ConversionError(f"{path}: has no weight_map of tensor names to shards")
    tensors: dict[str, Tensor] = {}
    for name in sorted(set(shards.values())):
        # An index names files beside itself; a path that leads elsewhere is not followed.
        shard = path.parent / Path(name).name
        if not shard.is_file():
            raise ConversionError(f"{path}: names the shard {name}, which is not there")
        tensors |= _read_file(shard)
    absent = sorted(set(shards) - set(tensors))
    if absent:
        raise ConversionError(f"{path}: promises {absent[0]}, which {shards[absent[0]]} lacks")
    return tensors


def refuse_misfits(folder: Path, problems: dict[str, list[str]]) -> None:
    """Refuse weights that a model cannot take; ``problems`` lists their names by what is wrong.

    Raises:
        MorError: naming up to three of the first kind that has any.
    """
    for what, keys in problems.items():
        if keys:
            some = ", ".join(sorted(keys)[:3])
            raise MorError(f"{folder}: weights {what} ({len(keys)}): {some}; convert or save anew")


def _read_file(path: Path) -> dict[str, Tensor]:
    readers: dict[str, Callable[[Path], Any]] = {
        ".safetensors": load_file,
        ".bin": lambda file: torch.load(file, map_location="cpu", weights_only=True),
    }
    if path.suffix not in readers:
        raise ConversionError(f"{path}: weights end in .safetensors or .bin")
    try:
        content = readers[path.suffix](path)
    except SafetensorError as error:
        raise ConversionError(f"{path}: cut short or not safetensors: {one_line(error)}") from error
    # torch.load has no error of its own: a damaged archive raises whatever met the damage.
    except Exception as error:
        raise ConversionError(
            f"{path}: cut short, or not plain weights: {one_line(error)[:200]}"
        ) from error
    if not isinstance(content, dict):
        raise ConversionError(f"{path}: holds a {type(content).__name__}, not a state_dict")
    return {name: aligned(t) for name, t in content.items() if isinstance(t, Tensor)}
