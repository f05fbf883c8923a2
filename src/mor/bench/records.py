"""From runs to rows: one record per system and workload, with the cost model beside it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mor.bench.bound import bounds
from mor.bench.check import Checked
from mor.bench.peers import Peer
from mor.bench.rates import Rates
from mor.bench.systems import EngineSystem
from mor.bench.trace import Run, medians, numbers
from mor.bench.workload import Workload
from mor.disk import append_jsonl
from mor.provenance import provenance

System = EngineSystem | Peer
Runs = dict[tuple[str, str], list[Run]]


@dataclass
class Results:
    """What a benchmark measured.

    Attributes:
        rows: one record per system and workload.
        checks: one per system.
        left_out: systems that could not run, and why.
        rates: of the machine, as recorded.
        load: average load at the beginning and at the end.
        device: name of the GPU; None for the CPU.
    """

    rows: list[dict[str, Any]] = field(default_factory=list)
    checks: list[Checked] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)
    rates: dict[str, object] = field(default_factory=dict)
    load: list[float] = field(default_factory=list)
    device: str | None = None


def record(
    systems: Sequence[System],
    workloads: Sequence[Workload],
    runs: Runs,
    rates: dict[bool, Rates],
    results: Results,
    common: dict[str, Any],
) -> None:
    """Fill ``results.rows``: one row per workload and system.

    Args:
        systems, workloads: what ran.
        runs: by names of system and workload.
        rates: of the machine, of whole and of 8-bit weights.
        results: with its checks.
        common: what every row says too.
    """
    checks = {check.system: check for check in results.checks}
    ours = [s for s in systems if isinstance(s, EngineSystem)]
    base = next((s for s in ours if s.config.num_recursions == 1), None)
    for workload in workloads:
        for system in systems:
            taken = runs.get((system.name, workload.name))
            if not taken:
                continue
            row = _row(system, workload, taken, rates, base)
            checked = checks[system.name]
            row |= {"checked": checked.requests, "equal": checked.equal, "ties": checked.ties}
            row |= common | {"rounds": len(taken)}
            results.rows.append(row)
    _compare(results.rows, ours)


def _row(
    system: System,
    workload: Workload,
    taken: list[Run],
    rates: dict[bool, Rates],
    base: EngineSystem | None,
) -> dict[str, Any]:
    middle = medians([numbers(run) for run in taken])
    clients = taken[0].concurrency
    row: dict[str, Any] = workload.record() | {"system": system.name, "clients": clients} | middle
    if isinstance(system, EngineSystem):
        counters = [run.counters for run in taken]
        for name in ("tokens_per_tick", "tokens_per_gathering"):
            row[name] = medians([{name: c[name], "tokens_per_s": 0.0} for c in counters])[name]
        row |= {"forced_exits": system.forced, "unrolled_layers": system.config.num_hidden_layers}
        config, saves_depth = system.config, system.saves_depth
    else:
        row |= {"peer": system.kind, "peer_versions": system.versions}
        row |= {"peer_details": system.details}
        if base is None:
            return row
        config, saves_depth = base.config, False
    if system.int8 in rates:
        found = [bounds(config, workload, run, rates[system.int8], saves_depth) for run in taken]
        row |= {name: _middle([one[name] for one in found]) for name in found[0]}
        row["reached"] = middle["tokens_per_s"] / row["bound"]
        if "own_bound" in row:
            row["own_reached"] = middle["tokens_per_s"] / row["own_bound"]
    depth = middle["mean_depth"] or float(config.num_recursions)
    executed: float = config.num_prelude_layers + config.num_coda_layers
    executed += depth * config.num_recursion_layers
    if middle["between_tokens_p50_s"] is not None:
        row["per_layer_p50_s"] = middle["between_tokens_p50_s"] / executed
    return row


def _middle(values: list[float]) -> float:
    middle = medians([{"value": value, "tokens_per_s": 0.0} for value in values])["value"]
    assert middle is not None
    return middle


def _compare(rows: list[dict[str, Any]], ours: list[EngineSystem]) -> None:
    """Beside each of our rows: the ratio to our vanilla, and the ratio of FLOPs.

    The vanilla is the one of the same unrolled depth where it takes part, else the first; with
    weights of 8 bits where the row's have.
    """
    by_name = {system.name: system for system in ours}
    for row in rows:
        if row["system"] not in by_name:
            continue
        int8 = by_name[row["system"]].int8
        vanilla = [s.name for s in ours if s.config.num_recursions == 1 and s.int8 == int8]
        there = {r["system"]: r for r in rows if r["workload"] == row["workload"]}
        beside = [there[name] for name in vanilla if name in there]
        if not beside:
            continue
        alike = [r for r in beside if r["unrolled_layers"] == row["unrolled_layers"]]
        against = (alike or beside)[0]
        row["against"] = against["system"]
        row["ratio"] = row["tokens_per_s"] / against["tokens_per_s"]
        if row["steady_tokens_per_s"] and against["steady_tokens_per_s"]:
            row["steady_ratio"] = row["steady_tokens_per_s"] / against["steady_tokens_per_s"]
        if "flops_per_token" in row:
            row["flops_ratio"] = against["flops_per_token"] / row["flops_per_token"]


def write(results: Results, path: Path) -> None:
    """Append the rows to ``path`` as JSON lines, each with its origin; and what could not run."""
    header = provenance(results.device) | {"load_average": results.load}
    for row in results.rows:
        append_jsonl(path, {"benchmark": "serve"} | row | header | {"rates": results.rates})
    if results.left_out:
        append_jsonl(path, {"benchmark": "serve", "left_out": results.left_out} | header)
