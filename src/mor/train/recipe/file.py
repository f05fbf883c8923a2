"""Recipe files: YAML in, ``--set`` entries on top, YAML out."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import yaml

from mor.errors import nearest
from mor.recipes import FOLDER, builtin_recipes
from mor.train.recipe.recipe import Recipe, parse_recipe
from mor.train.recipe.sections import RecipeError


class _Loader(yaml.SafeLoader):
    """YAML whose numbers are YAML 1.2's: 3e-3 is a number, and 1:30 is not ninety."""


_NUMBERS = {
    "int": r"[-+]?(?:0|[1-9][0-9_]*)$",
    "float": r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?$|[-+]?\.(?:inf|nan)$",
}
_TAGS = {f"tag:yaml.org,2002:{kind}": re.compile(form, re.I) for kind, form in _NUMBERS.items()}
_Loader.yaml_implicit_resolvers = {
    first: [pair for pair in pairs if pair[0] not in _TAGS]
    for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _tag, _form in _TAGS.items():
    _Loader.add_implicit_resolver(_tag, _form, list("-+.0123456789"))


def _read_yaml(text: str) -> Any:
    try:
        return yaml.load(text, _Loader)
    except RecursionError:
        raise yaml.YAMLError("it is nested too deeply") from None


def dump_recipe(recipe: Recipe) -> str:
    """The recipe as YAML, every default written out; :func:`load_recipe` reads it back."""
    return yaml.safe_dump(json.loads(recipe.model_dump_json()), sort_keys=False)


def apply_overrides(raw: dict[str, Any], overrides: list[str]) -> dict[str, Any]:
    """Set ``a.b=value`` entries (values read as YAML) on a copy of ``raw``.

    Raises:
        RecipeError: an entry without ``=``, a value that is not YAML, or a path through something
            that is no section.
    """
    result = copy.deepcopy(raw)
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
        try:
            section[leaf] = _read_yaml(text)
        except yaml.YAMLError:
            raise RecipeError(f"--set {entry!r}: {text!r} is not a YAML value") from None
    return result


def load_recipe(source: str | Path, overrides: list[str] | None = None) -> Recipe:
    """Read a YAML recipe, or one that comes with mor by its name, and apply ``--set`` entries.

    Raises:
        RecipeError: no such recipe, not YAML, or a wrong field.
    """
    path = Path(source).expanduser()
    if not path.is_file() and str(source) in builtin_recipes():
        path = FOLDER / f"{source}.yaml"
    if not path.is_file():
        close = nearest(str(source), builtin_recipes())
        hint = f"; did you mean {close}?" if close else " (mor recipes lists what comes along)"
        raise RecipeError(f"recipe {str(source)!r} does not exist{hint}")
    raw = read_mapping(path, "name, model, data, train")
    return parse_recipe(apply_overrides(raw, overrides or []), str(path))


def read_mapping(path: Path, fields: str) -> dict[str, Any]:
    """The mapping that a YAML file holds, with YAML 1.2's numbers.

    Args:
        path: of the file.
        fields: what it should hold, for the message.

    Raises:
        RecipeError: the file cannot be read, is not YAML or holds something else.
    """
    try:
        raw = _read_yaml(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RecipeError(f"{path} cannot be read: {error.strerror or error}") from None
    except (yaml.YAMLError, ValueError) as error:
        line = " ".join(str(error).split())
        raise RecipeError(f"{path} is not YAML: {line}") from None
    if not isinstance(raw, dict):
        raise RecipeError(f"{path} must hold a mapping of {fields}")
    return raw
