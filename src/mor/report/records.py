"""The files of a run folder, read and checked.

A run folder holds ``summary.json`` (what was trained and at what cost), ``log.jsonl`` (one object
a line while it trained) and ``eval.json`` (what it then scored). Every NLL is in nats per token.
In ``eval.json`` a *depth* counts recursions: 0 to ``num_recursions``.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

from mor.config.choices import RouterType
from mor.errors import MorError
from mor.report.shown import Shown
from mor.run_files import EVAL, LOG, SUMMARY

__all__ = [
    "DepthCap",
    "EvalResult",
    "Run",
    "Sample",
    "Score",
    "Summary",
    "load_run",
    "load_runs",
    "read_log",
]

Count = Annotated[int, Field(ge=0)]
# Strict JSON has no NaN: a run that diverged writes null, and is shown as nan, not as missing.
Real = Annotated[float, BeforeValidator(lambda value: math.nan if value is None else value)]


class _Record(BaseModel):
    # Keys that later versions add are kept, so an old report command never loses a new number.
    model_config = ConfigDict(extra="allow", frozen=True)


class Summary(_Record):
    """``summary.json``: the model, its cost (tokens, FLOPs, seconds, bytes) and its origin."""

    name: Annotated[str, Field(min_length=1)]
    family: Literal["vanilla", "recursive", "mor"]
    router: Literal["none", RouterType]
    num_recursions: Annotated[int, Field(ge=1)]
    parameters: Count
    non_embedding_parameters: Count | None = None
    tokens: Count | None = None
    steps: Count | None = None
    train_flops: float | None = None
    wall_s: float | None = None
    tokens_per_s: float | None = None
    peak_memory_bytes: Count | None = None
    seed: int | None = None
    commit: str | None = None
    machine: str | None = None
    versions: dict[str, str] = {}
    command: str | None = None
    capacities: list[float] | None = None


class Score(_Record):
    """One evaluation: NLL (nats/token), perplexity, bits per byte, depth (recursions/token)."""

    nll: Real
    perplexity: float | None = None
    bits_per_byte: float | None = None
    mean_depth: float | None = None
    active_fraction: list[Real] = []


class DepthCap(_Record):
    """The causal score when no token may pass ``max_depth`` recursions."""

    max_depth: Annotated[int, Field(ge=1)]
    nll: Real
    mean_depth: float | None = None


class RouterMetrics(_Record):
    """Router metrics over the evaluation data; ``accuracy`` per depth."""

    accuracy: list[Real] = []
    dead_tokens: float | None = None
    max_vio: float | None = None
    entropy: float | None = None


class Sample(_Record):
    """A passage of T tokens: decoded strings, recursions of each, NLL of each (nats, optional)."""

    tokens: list[str]
    depths: list[Count]
    nll: list[float | None] = []
    title: str = ""

    @model_validator(mode="after")
    def _same_length(self) -> Sample:
        if len(self.depths) != len(self.tokens):
            raise ValueError(f"{len(self.depths)} depths for {len(self.tokens)} tokens")
        if self.nll and len(self.nll) != len(self.tokens):
            raise ValueError(f"{len(self.nll)} nll values for {len(self.tokens)} tokens")
        return self


class EvalResult(_Record):
    """``eval.json``: the causal score, the leaky one where it exists, depth caps, a passage."""

    data: str | None = None
    split: str | None = None
    tokens: Count | None = None
    bytes_per_token: float | None = None
    causal: Score
    leaky: Score | None = None
    gap: float | None = None
    random_routes_nll: float | None = None
    depth_cap: list[DepthCap] = []
    router: RouterMetrics | None = None
    sample: Sample | None = None
    kind: str | None = None
    shown: list[Shown] = []


@dataclass(frozen=True)
class Run:
    """One run folder. ``label`` names it in tables and plots and is unique within a report."""

    path: Path
    label: str
    summary: Summary
    log: list[dict[str, float]] = field(default_factory=list)
    eval: EvalResult | None = None

    @property
    def routed(self) -> bool:
        """Whether a router picks tokens: false for one recursion, or the same for every token."""
        return self.summary.num_recursions > 1 and self.summary.router not in ("none", "fixed")

    def nll_at_cap(self, max_depth: int) -> float | None:
        """Return the causal NLL (nats/token) with depth capped, None where not measured."""
        caps = self.eval.depth_cap if self.eval else []
        return next((cap.nll for cap in caps if cap.max_depth == max_depth), None)

    def series(self, key: str, x: str = "tokens") -> tuple[list[float], list[float]]:
        """Return the finite points (x, key) of the log, in order; both empty without any."""
        points = [(row[x], row[key]) for row in self.log if x in row and key in row]
        points = [point for point in points if all(map(math.isfinite, point))]
        return [px for px, _ in points], [py for _, py in points]

    def depths_of(self, metric: str) -> list[int]:
        """Return the depths for which the log has ``metric/<depth>``, in order."""
        keys = {key for row in self.log for key in row if key.startswith(metric + "/")}
        tails = {key.removeprefix(metric + "/") for key in keys}
        return sorted(int(tail) for tail in tails if tail.isdecimal())


def load_runs(paths: Sequence[str | Path]) -> list[Run]:
    """Read several run folders; equal names get ``#2``, ``#3`` behind them.

    Raises:
        MorError: no folder given, or one that :func:`load_run` refuses.
    """
    if not paths:
        raise MorError("run_dirs is empty: name at least one run folder")
    seen: set[str] = set()
    runs = []
    for run in map(load_run, paths):
        label, number = run.label, 2
        while label in seen:
            label, number = f"{run.label} #{number}", number + 1
        seen.add(label)
        runs.append(replace(run, label=label))
    return runs


def load_run(path: str | Path) -> Run:
    """Read one run folder.

    ``summary.json`` must be there. A run that was not evaluated has no ``eval.json``, and a
    converted checkpoint has no ``log.jsonl``; their numbers are then simply absent.

    Raises:
        MorError: the folder or ``summary.json`` is missing, or a file holds something else; the
            message names the file, the field, the value found and what would be right.
    """
    path = Path(path)
    if not path.is_dir():
        raise MorError(f"{path} is not a folder; a run folder holds {SUMMARY} and {EVAL}")
    summary_path, log_path, eval_path = path / SUMMARY, path / LOG, path / EVAL
    if not summary_path.is_file():
        raise MorError(f"{summary_path} is missing: is {path} a run folder, and finished?")
    summary = _read(Summary, summary_path)
    result = _read(EvalResult, eval_path) if eval_path.exists() else None
    if result and result.sample:
        check_depths(result.sample.depths, summary.num_recursions, f"{eval_path}: sample.depths")
    log = read_log(log_path) if log_path.exists() else []
    return Run(path=path, label=summary.name, summary=summary, log=log, eval=result)


def check_depths(depths: Sequence[int], num_recursions: int, what: str) -> None:
    """Raise MorError unless every depth lies in 0..num_recursions."""
    for index, depth in enumerate(depths):
        if not 0 <= depth <= num_recursions:
            raise MorError(f"{what}[{index}] is {depth}; 0 to {num_recursions} would be right")


def read_log(path: str | Path) -> list[dict[str, float]]:
    """Read ``log.jsonl``: one dict of numbers per step, steps rising.

    A last line cut short by a killed run is left out. Rows of the same step are merged, and rows
    that a resumed run trained again replace those it had written before.

    Raises:
        MorError: a line other than the last is not a JSON object, or has no integer ``step``.
    """
    path = Path(path)
    lines = _bytes(path).splitlines()
    rows: list[dict[str, float]] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            if number == len(lines):
                break
            raise MorError(f"{path}, line {number}: not JSON ({error})") from None
        if not isinstance(record, dict) or type(record.get("step")) is not int:
            raise MorError(
                f"{path}, line {number}: found {_short(record)}; "
                'a JSON object with an integer "step" would be right'
            )
        row = {key: value for key, value in record.items() if type(value) in (int, float)}
        while rows and rows[-1]["step"] > row["step"]:
            rows.pop()
        if rows and rows[-1]["step"] == row["step"]:
            rows[-1].update(row)
        else:
            rows.append(row)
    return rows


_R = TypeVar("_R", bound=_Record)


def _read(kind: type[_R], path: Path) -> _R:
    try:
        data = json.loads(_bytes(path))
    except ValueError as error:
        raise MorError(f"{path}: not JSON ({error})") from None
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"])) or "the whole file"
        found = "nothing" if first["type"] == "missing" else _short(first["input"])
        raise MorError(f"{path}: {where}: found {found}; {first['msg']}") from None


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise MorError(f"{path} cannot be read: {error.strerror}") from None


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
