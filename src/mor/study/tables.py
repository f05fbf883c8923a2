"""The tables of a study: ours and the paper's numbers in one row."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from mor.errors import MorError
from mor.study.file import Study
from mor.study.law import Law, Point, fit_recurrence_law

Record = dict[str, Any]


@dataclass(frozen=True)
class Table:
    """Cells as text, with a heading and a sentence below."""

    title: str
    columns: list[str]
    rows: list[list[str]]
    note: str = ""

    def markdown(self) -> str:
        """As GitHub shows it."""
        cells = [[cell.replace("|", "\\|") for cell in row] for row in self.rows]
        lines = [self.columns, ["---"] * len(self.columns), *cells]
        body = "\n".join(f"| {' | '.join(line)} |" for line in lines)
        return f"## {self.title}\n\n{body}\n" + (f"\n{self.note}\n" if self.note else "")


def best_records(records: Sequence[Record]) -> dict[tuple[str, int], list[Record]]:
    """The records of each (row, budget) at the row's best point: one for each seed.

    The best point is the one with the lowest causal NLL of the first seed and the whole budget.
    """
    best: dict[str, Any] = {}
    for row in dict.fromkeys(record["row"] for record in records):
        mine = [record for record in records if record["row"] == row]
        whole = max(record["budget"] for record in mine)
        first = [r for r in mine if r["budget"] == whole and r["seed"] == mine[0]["seed"]]
        best[row] = min(first, key=lambda record: _nll(record))["point"]
    chosen: dict[tuple[str, int], list[Record]] = {}
    for record in records:
        if record["point"] == best[record["row"]]:
            chosen.setdefault((record["row"], record["budget"]), []).append(record)
    return chosen


def whole_budgets(groups: Iterable[tuple[str, int]]) -> dict[str, int]:
    """The number of each row's whole budget, its largest."""
    whole: dict[str, int] = {}
    for row, budget in groups:
        whole[row] = max(budget, whole.get(row, 0))
    return whole


def comparison(study: Study, records: Sequence[Record]) -> Table:
    """One line for each row and budget, with the spread over seeds and the paper's numbers."""
    groups = best_records(records)
    budgets = len({budget for _, budget in groups}) > 1
    whole = whole_budgets(groups)
    columns = [
        "row", *(["budget"] if budgets else []), "seeds", "parameters", "tokens", "FLOPs",
        "causal NLL", "± sd", "causal - leaky", "depth", "few-shot %", "time", "peak memory",
        "paper NLL", "paper few-shot %",
    ]  # fmt: skip
    if study.reference:
        columns += [f"NLL - {study.reference}", "paper's"]
    rows = []
    for (row, budget), group in groups.items():
        summary, paper = group[0]["summary"], group[0]["paper"] or {}
        nlls = [_nll(record) for record in group]
        cells = [
            row, *([str(budget + 1)] if budgets else []), str(len(group)),
            short_count(summary.get("non_embedding_parameters")),
            short_count(summary.get("tokens")),
            _or(summary.get("train_flops"), "{:.3g}".format),
            f"{statistics.mean(nlls):.4f}",
            f"{statistics.stdev(nlls):.4f}" if len(nlls) > 1 else "one seed",
            _mean(group, lambda record: record["gap"], "{:+.4f}"),
            _mean(group, lambda record: record["causal"]["mean_depth"], "{:.2f}"),
            _mean(group, lambda record: record["few_shot"], "{:.1f}"),
            _mean(group, lambda record: record["summary"].get("wall_s"), "{:,.0f} s"),
            _mean(group, lambda record: _mib(record), "{:,.0f} MiB"),
            _or(paper.get("nll"), "{:.4f}".format), _or(paper.get("few_shot"), "{:.1f}".format),
        ]  # fmt: skip
        if study.reference:
            # The whole budget of a row stands against that of the other, and so on down.
            below = whole[row] - budget
            other = groups.get((study.reference, whole.get(study.reference, 0) - below))
            ours = statistics.mean(nlls) - statistics.mean(map(_nll, other)) if other else None
            theirs = ((other[0]["paper"] or {}).get("nll")) if other else None
            said = paper.get("nll")
            cells += [
                _or(ours, "{:+.4f}".format),
                _or(said - theirs if said and theirs else None, "{:+.4f}".format),
            ]
        rows.append(cells)
    note = (
        "NLL in nats per token under the causal rule, on validation text. Parameters without the "
        "embedding. The paper's numbers are of its own models, data and vocabulary: compare "
        "differences, not values."
    )
    return Table("Comparison", columns, rows, note)


def grid_tables(study: Study, records: Sequence[Record]) -> list[Table]:
    """For each row with a grid, every point that was tried."""
    tables = []
    for row, part in study.rows.items():
        if not part.grid:
            continue
        mine = [record for record in records if record["row"] == row]
        seed = study.seeds_of(row)[0]
        lines = [
            [*(str(record["point"][field]) for field in part.grid), f"{_nll(record):.4f}"]
            for record in sorted(mine, key=_nll)
            if record["seed"] == seed and record["budget"] == max(r["budget"] for r in mine)
        ]
        tables.append(Table(f"Grid of {row}", [*part.grid, "causal NLL"], lines))
    return tables


def law_points(records: Sequence[Record]) -> list[Point]:
    """What the recurrence law is fitted to; the layers are taken to be of one size."""
    points = []
    for record in records:
        summary = record["summary"]
        shared = summary.get("shared_parameters")
        if shared is None:
            continue
        once = summary["non_embedding_parameters"] - shared
        points.append(Point(once, shared, summary["passes"], summary["tokens"], _nll(record)))
    return points


def law_table(records: Sequence[Record], resamples: int = 100) -> Table | None:
    """phi of each family with loops, fitted with the models of one pass; None without any fit."""
    records = [record for group in best_records(records).values() for record in group]
    families = list(dict.fromkeys(record["family"] for record in records))
    lines = []
    for family in families:
        mine = [record for record in records if record["family"] == family]
        if all(record["summary"]["num_recursions"] == 1 for record in mine):
            continue
        plain = [
            record
            for record in records
            if record["summary"]["num_recursions"] == 1 and record["family"] != family
        ]
        try:
            law = fit_recurrence_law(law_points([*plain, *mine]), resamples)
        except MorError as error:
            lines.append([family, "-", "-", "-", "-", str(error)])
            continue
        lines.append([family, f"{law.phi:.3f}", _interval(law), f"{law.e:.3f}",
                      f"{law.error:.4f}", f"{law.points} points"])  # fmt: skip
    if all(line[1] == "-" for line in lines):
        return None
    return Table(
        "What a loop is worth",
        ["family", "phi", "90% interval", "E", "residual (nats)", "fit"],
        lines,
        "L = E + A (N_once + R^phi N_rec)^-a + B D^-b; for routed models R is the mean number of "
        "passes. Published for plain recursion: 0.46 (arXiv 2604.21106).",
    )


def _interval(law: Law) -> str:
    return "-" if law.interval is None else f"{law.interval[0]:.2f} to {law.interval[1]:.2f}"


def _nll(record: Record) -> float:
    return float(record["causal"]["nll"])


def _mib(record: Record) -> float | None:
    amount = record["summary"].get("peak_memory_bytes")
    return None if amount is None else amount / 2**20


def _mean(group: Sequence[Record], value: Callable[[Record], Any], form: str) -> str:
    values = [value(record) for record in group]
    known = [number for number in values if number is not None]
    return form.format(statistics.mean(known)) if known else "-"


def _or(value: Any, form: Callable[[Any], str]) -> str:
    return "-" if value is None else form(value)


def short_count(value: float | None) -> str:
    """12345 as `12.3K`; a dash where there is none."""
    if value is None:
        return "-"
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if value >= size:
            return f"{value / size:.3g}{unit}"
    return str(value)
