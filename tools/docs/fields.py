"""The references of recipes and of MoRConfig, from the types that check them."""

from __future__ import annotations

import dataclasses
import inspect
import re
import types
import typing
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from tools.docs.cli import cell


def recipe_page() -> str:
    """Markdown: every field of a recipe, section by section."""
    from mor.train.recipe.recipe import Recipe

    parts = [
        "# Recipes",
        "",
        "A recipe is one YAML file. `mor train RECIPE` checks it before anything runs, and refuses "
        "a field that does not exist. `mor recipes` lists those that come along. "
        "`--set train.seed=1` changes a field for one run.",
        "",
        "The section `model` takes the [fields of MoRConfig](config.md), or `preset` "
        "(`135m`, `360m`, `730m`, `1.7b`) and `family` (`vanilla`, `recursive`, `mor`) "
        "with fields on top.",
    ]
    for path, section in sections(Recipe):
        parts += ["", f"## {path or 'recipe'}", "", first_sentence(section), ""]
        parts += ["| field | type | default | |", "|---|---|---|---|"]
        parts += [row(name, field) for name, field in section.model_fields.items()]
    return "\n".join(parts) + "\n"


def sections(section: type[BaseModel], path: str = "") -> list[tuple[str, type[BaseModel]]]:
    """A section and those inside it, by their dotted path; ``[]`` marks one of a list."""
    found = [(path, section)]
    for name, field in section.model_fields.items():
        inner, many = model_inside(field.annotation)
        if inner is not None:
            at = f"{path}.{name}".lstrip(".") + ("[]" if many else "")
            found += sections(inner, at)
    return found


def model_inside(annotation: Any) -> tuple[type[BaseModel] | None, bool]:
    """The section that a type holds, and whether it holds a list of them."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation, False
    for part in get_args(annotation):
        inner, many = model_inside(part)
        if inner is not None:
            return inner, many or get_origin(annotation) is list
    return None, False


def row(name: str, field: Any) -> str:
    """One row of a recipe's table."""
    if field.is_required():
        default = "needed"
    else:
        value = field.default if field.default is not PydanticUndefined else field.default_factory()
        default = f"`{shown(value)}`"
    said = [field.description or ""]
    limits = [limit for part in field.metadata if (limit := limit_of(part))]
    said += [", ".join(limits)] if limits else []
    extra = field.json_schema_extra
    if isinstance(extra, dict) and "decides" in extra:
        said.append(f"decides: {extra['decides']}")
    notes = "; ".join(part for part in said if part)
    return f"| `{name}` | {cell(type_name(field.annotation))} | {cell(default)} | {cell(notes)} |"


def limit_of(part: Any) -> str:
    """What a constraint of pydantic's allows, in signs; empty for what is no constraint."""
    signs = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}
    for name, sign in signs.items():
        if (value := getattr(part, name, None)) is not None:
            return f"{sign} {value}"
    if (least := getattr(part, "min_length", None)) is not None:
        return f"at least {least}"
    if (pattern := getattr(part, "pattern", None)) is not None:
        return f"as `{pattern}`"
    return ""


def type_name(annotation: Any) -> str:
    """A type as one reads it in a table: the words of a Literal, ``list of``, ``or null``."""
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin is typing.Annotated:
        return type_name(parts[0])
    if origin is Literal:
        return ", ".join(f"`{part}`" for part in parts)
    if origin in (typing.Union, types.UnionType):
        return " or ".join("null" if p is type(None) else type_name(p) for p in parts)
    if origin is list:
        return f"list of {type_name(parts[0])}"
    if origin is dict:
        return f"mapping of {type_name(parts[0])} to {type_name(parts[1])}"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "section"
    names = {Path: "path", str: "text", int: "whole number", float: "number", bool: "true or false"}
    return names.get(
        annotation, "any" if annotation is Any else getattr(annotation, "__name__", "")
    )


def shown(value: Any) -> str:
    """A default as YAML has it."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value)


def first_sentence(section: type[Any]) -> str:
    """The first paragraph of a docstring."""
    return " ".join((inspect.getdoc(section) or "").split("\n\n")[0].split())


def config_page() -> str:
    """Markdown: every field of MoRConfig with its type, default and meaning."""
    from mor.config import MoRConfig, field_types
    from mor.config.fields import Fields

    meanings, types_ = meanings_of(Fields) | meanings_of(MoRConfig), field_types()
    parts = [
        "# MoRConfig",
        "",
        "Every field that defines the network. A name that is no field is refused. "
        "*derived* means that the value follows from other fields unless it is given.",
        "",
        "| field | type | default | |",
        "|---|---|---|---|",
    ]
    for field in dataclasses.fields(Fields):
        optional = type(None) in get_args(typing.get_type_hints(Fields)[field.name])
        derived = field.default is None and not optional
        default = "*derived*" if derived else f"`{shown(field.default)}`"
        kind = types_[field.name]
        if derived:  # None only says that it follows from others
            kind = typing.get_type_hints(Fields)[field.name]
        meaning = cell(meanings.pop(field.name, ""))
        parts.append(f"| `{field.name}` | {cell(type_name(kind))} | {default} | {meaning} |")
    if meanings:
        parts += ["", "Other ways to say some of it:", ""]
        parts += [f"- `{name}`: {' '.join(text.split())}" for name, text in meanings.items()]
    return "\n".join(parts) + "\n"


def meanings_of(described: type[Any]) -> dict[str, str]:
    """What a docstring says about each field: its entries ``name, name: text``."""
    text = (inspect.getdoc(described) or "").replace("``", "`").partition("\nRaises:")[0]
    entry = re.compile(r"^    (\w+(?:, \w+)*): (.*(?:\n(?: {8,}).*)*)", re.MULTILINE)
    return {
        name: " ".join(match[2].split())
        for match in entry.finditer(text)
        for name in match[1].split(", ")
    }
