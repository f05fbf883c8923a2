"""A study file: what to train and what to compare. Checked as a whole before anything runs.

    title: Main comparison
    reference: vanilla                 # the row that differences are taken from
    seeds: [0, 1, 2]
    base: {model: {...}, data: {...}, train: {...}}      # what the rows share: parts of a recipe
    evaluate: {max_sequences: 256, batch_size: 16}
    tasks: [mor_quartz]                # of lm-eval; none by default
    rows:
      vanilla:
        model: {num_recursions: 1}     # on top of the base
        seeds: [0]                     # in place of the study's
        grid: {train.learning_rate: [1.0e-3, 3.0e-3]}
        family: vanilla                # the curve that a row belongs to; default its own name
        paper: {nll: 2.7824, few_shot: 42.3, what: 360M at 16.5e18 FLOPs}

Every point of a grid is trained with the first seed; the other seeds are trained at the best
point. With `train.branches` in a recipe a row has several budgets; `paper.nll` is then a list, the
smallest budget first.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mor.errors import MorError, nearest
from mor.train import Recipe
from mor.train.recipe.file import apply_overrides, read_mapping
from mor.train.recipe.recipe import parse_recipe

FILES = Path(__file__).resolve().parent / "files"


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Paper(_Section):
    """What the paper has in the same row."""

    nll: float | list[float] | None = None
    few_shot: float | None = None
    what: str = ""


class Row(_Section):
    """One line of the table: a model and how it is trained."""

    model: dict[str, Any] = {}
    data: dict[str, Any] = {}
    train: dict[str, Any] = {}
    uptrain: dict[str, Any] | None = None
    seeds: Annotated[list[int], Field(min_length=1)] | None = None
    grid: dict[str, Annotated[list[Any], Field(min_length=1)]] = {}
    family: str | None = None
    paper: Paper | None = None


class Evaluation(_Section):
    """How much of the validation text is looked at, spread over all of it."""

    max_sequences: Annotated[int, Field(ge=1)] | None = 256
    batch_size: Annotated[int, Field(ge=1)] = 16


class Study(_Section):
    """A whole study file."""

    title: Annotated[str, Field(min_length=1)]
    note: str = ""
    reference: str | None = None
    seeds: Annotated[list[int], Field(min_length=1)] = [0]
    base: dict[str, Any]
    evaluate: Evaluation = Evaluation()
    tasks: list[str] = []
    questions: Annotated[int, Field(ge=1)] | None = None
    rows: Annotated[dict[str, Row], Field(min_length=1)]

    def seeds_of(self, row: str) -> list[int]:
        """The seeds of a row, the first of which goes through its grid."""
        return self.rows[row].seeds or self.seeds


@dataclass(frozen=True)
class Job:
    """One training with its evaluation.

    Attributes:
        row: of the table.
        seed: of weights and order.
        point: of the row's grid: field and value.
        recipe: what is trained.
    """

    row: str
    seed: int
    point: Mapping[str, Any]
    recipe: Recipe

    @property
    def name(self) -> str:
        """Also of the run folder."""
        return self.recipe.name


def builtin_studies() -> list[str]:
    """Names of the studies that come with mor."""
    return sorted(path.stem for path in FILES.glob("*.yaml"))


def load_study(source: str | Path, overrides: list[str] | None = None) -> Study:
    """Read a study file, or one that comes with mor by its name.

    Args:
        source: a YAML file or a name.
        overrides: `base.train.learning_rate=1e-3`, on top of the file.

    Raises:
        MorError: no such study, no YAML, or a wrong field: every one is named.
    """
    path = Path(source).expanduser()
    if not path.is_file() and str(source) in builtin_studies():
        path = FILES / f"{source}.yaml"
    if not path.is_file():
        close = nearest(str(source), builtin_studies())
        hint = f"did you mean {close}?" if close else f"there are {', '.join(builtin_studies())}"
        raise MorError(f"study {str(source)!r} does not exist; {hint}")
    raw = apply_overrides(read_mapping(path, "title, base, rows"), overrides or [])
    try:
        study = Study.model_validate(raw)
    except ValidationError as error:
        found = [
            f"{'.'.join(map(str, item['loc'])) or 'study'}={item['input']!r}: {item['msg'].lower()}"
            if item["type"] not in ("missing", "extra_forbidden")
            else f"{'.'.join(map(str, item['loc']))} is "
            + ("missing" if item["type"] == "missing" else "not a field")
            for item in error.errors(include_url=False)
        ]
        raise MorError(f"{path}: {'; '.join(found)}") from None
    if study.reference is not None and study.reference not in study.rows:
        raise MorError(
            f"{path}: reference={study.reference!r} must be one of the rows: "
            f"{', '.join(study.rows)}"
        )
    return study


def expand(study: Study, out: Path, scale: float = 1.0) -> list[Job]:
    """The jobs of the first round: every row at every point of its grid, with its first seed.

    Args:
        study: loaded.
        out: folder of the study; runs are in its `runs`.
        scale: every budget is multiplied by it.

    Raises:
        RecipeError: what a row makes is no recipe; the message names the row.
        MorError: two trainings would be one, or a row sets `train.seed`.
    """
    jobs = []
    for row in study.rows:
        seed = study.seeds_of(row)[0]
        jobs += [make_job(study, row, seed, point, out, scale) for point in points(study.rows[row])]
    names = [job.name for job in jobs]
    for job in jobs:
        seeds = study.seeds_of(job.row)
        if names.count(job.name) > 1 or len(set(seeds)) < len(seeds):  # one run, counted twice
            raise MorError(
                f"row {job.row} makes {job.name} twice; seeds and grid values must differ"
            )
    return jobs


def more_seeds(
    study: Study, row: str, point: Mapping[str, Any], out: Path, scale: float = 1.0
) -> list[Job]:
    """The jobs of the second round: the other seeds of a row, at one point of its grid."""
    seeds = study.seeds_of(row)[1:]
    return [make_job(study, row, seed, point, out, scale) for seed in seeds]


def points(row: Row) -> Iterator[dict[str, Any]]:
    """Every combination of a row's grid; one empty point where there is none."""
    for values in itertools.product(*row.grid.values()):
        yield dict(zip(row.grid, values, strict=True))


def make_job(
    study: Study, row: str, seed: int, point: Mapping[str, Any], out: Path, scale: float
) -> Job:
    """The training of a row with a seed at a point of its grid. Raises as `expand`."""
    part = study.rows[row]
    fields = copy.deepcopy(study.base)
    for section in ("model", "data", "train", "uptrain"):
        own = copy.deepcopy(getattr(part, section))  # budgets are scaled in place below
        if own is not None:
            fields[section] = _merge(fields.get(section, {}), own)
    if not fields.get("uptrain"):
        fields.pop("uptrain", None)
    for path, value in point.items():
        *parents, leaf = path.split(".")
        place = fields
        for parent in parents:
            place = place.setdefault(parent, {})
        place[leaf] = value
    train = fields.setdefault("train", {})
    if "seed" in train:
        raise MorError(f"row {row}: train.seed={train['seed']!r} must be left out; use seeds")
    train["seed"] = seed
    for budget in (train.get("budget", {}), *train.get("branches", [])):
        for unit, amount in budget.items():
            whole = max(1, round(amount * scale))
            budget[unit] = amount * scale if unit == "flops" else whole
    values = "".join(f"-{path.rsplit('.')[-1]}-{value}" for path, value in point.items())
    fields |= {"name": f"{row}{values}-seed-{seed}", "output": str(out / "runs")}
    return Job(row, seed, dict(point), parse_recipe(fields, f"row {row}"))


def _merge(base: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """`own` on top of `base`; a budget replaces another."""
    merged = dict(base)
    for name, value in own.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(name), Mapping)
        merged[name] = _merge(merged[name], value) if both and name != "budget" else value
    return merged
