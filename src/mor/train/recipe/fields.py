"""What a field of a recipe decides: said on the field, read from it wherever it matters."""

from __future__ import annotations

from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel, Field

Decides = Literal[
    "weights",
    "weights and speed",
    "batch split",
    "optimiser",
    "length",
    "speed",
    "nothing",
]
"""What changes when the field changes.

weights             what is learnt, at the same speed: the seed
weights and speed   what is learnt, and the time of a step: the length of sequences
batch split         how a step's batch is cut into micro-batches: speed, and weights only where the
                    number of sequences in a step changes with it
optimiser           numbers of AdamW and clipping, which a branch may change
length              how long the run is and the shape of its schedule, a branch's own affair
speed               the time of a step and its memory; weights but for rounding stay the same
nothing             bookkeeping: what is logged, scored and kept, and where files lie
"""


def decides(what: Decides, default: Any = ..., **more: Any) -> Any:
    """A field of a section, marked with what it decides.

    Args:
        what: see :data:`Decides`.
        default: of the field; without one it is required.
        more: as for ``pydantic.Field``.
    """
    return Field(default, json_schema_extra={"decides": what}, **more)


def decided_by(section: type[BaseModel], name: str) -> Decides:
    """What the field ``name`` of ``section`` decides.

    Raises:
        KeyError: there is no such field, or it carries no mark.
    """
    extra = section.model_fields[name].json_schema_extra
    if not isinstance(extra, dict) or extra.get("decides") not in get_args(Decides):
        raise KeyError(f"{section.__name__}.{name} does not say what it decides")
    return extra["decides"]  # type: ignore[return-value]


def fields_that_decide(section: type[BaseModel], *what: Decides) -> set[str]:
    """The names of the fields of ``section`` that decide any of ``what``."""
    return {name for name in section.model_fields if decided_by(section, name) in what}


def lists_of_one(section: type[BaseModel], raw: Any) -> Any:
    """``raw`` with a list of one where a field takes a list and a single value was given."""
    if not isinstance(raw, dict):
        return raw
    listed = (list, tuple, type(None))
    return raw | {
        name: [raw[name]]
        for name, field in section.model_fields.items()
        if _is_list(field.annotation) and not isinstance(raw.get(name), listed)
    }


def _is_list(annotation: Any) -> bool:
    """Whether a field takes a list and, but for None, nothing else."""
    if get_origin(annotation) is list:
        return True
    kinds = [kind for kind in get_args(annotation) if kind is not type(None)]
    return len(kinds) == 1 and get_origin(kinds[0]) is list
