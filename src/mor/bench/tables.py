"""The results as a table on the screen and in Markdown, from one list of columns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from rich import box
from rich.table import Table

from mor.bench.records import Results
from mor.bench.trace import best_within

Show = Callable[[dict[str, Any]], str]


def _cell(name: str, form: str, scale: float = 1.0) -> Show:
    def show(row: dict[str, Any]) -> str:
        value = row.get(name)
        return "-" if value is None else format(value * scale, form)

    return show


def _pair(first: str, second: str, scale: float, form: str) -> Show:
    one, other = _cell(first, form, scale), _cell(second, form, scale)
    return lambda row: f"{one(row)} / {other(row)}"


def _speed(row: dict[str, Any]) -> str:
    spread = f" ({row['tokens_per_s_low']:,.1f}-{row['tokens_per_s_high']:,.1f})"
    return f"{row['tokens_per_s']:,.1f}" + (spread if row["rounds"] > 1 else "")


def _bound(row: dict[str, Any]) -> str:
    return f"{row['bound']:,.0f} ({row['reached']:.0%})" if "bound" in row else "-"


def _ratio(row: dict[str, Any]) -> str:
    if "flops_ratio" not in row or row["against"] == row["system"]:
        return "-"
    return f"{row['ratio']:.2f}x of {row['flops_ratio']:.2f}x"


def _equal(row: dict[str, Any]) -> str:
    return f"{row['equal'] + row['ties']}/{row['checked']}"


COLUMNS: tuple[tuple[str, Show], ...] = (
    ("system", lambda row: str(row["system"])),
    ("tokens/s", _speed),
    ("steady tokens/s", _cell("steady_tokens_per_s", ",.1f")),
    ("first token ms, p50 / p95", _pair("first_token_p50_s", "first_token_p95_s", 1e3, ",.0f")),
    ("between ms, p50 / p95", _pair("between_tokens_p50_s", "between_tokens_p95_s", 1e3, ",.1f")),
    ("ms per layer run", _cell("per_layer_p50_s", ".2f", 1e3)),
    ("KV MiB", _cell("kv_bytes", ",.1f", 1 / 2**20)),
    ("mean depth", _cell("mean_depth", ".2f")),
    ("MFLOP per token", _cell("flops_per_token", ",.0f", 1e-6)),
    ("tokens per pass / gathering", _pair("tokens_per_tick", "tokens_per_gathering", 1, ".1f")),
    ("bound tokens/s (reached)", _bound),
    ("of the bound at its own sizes", _cell("own_reached", ".0%")),
    ("against our vanilla, of FLOPs", _ratio),
    ("equal", _equal),
)


def workloads_of(results: Results) -> list[str]:
    """In the order they ran."""
    return list(dict.fromkeys(row["workload"] for row in results.rows))


def rich_tables(results: Results) -> list[Table]:
    """One per workload, a column per system: there are more measures than systems."""
    tables = []
    for workload in workloads_of(results):
        rows = [row for row in results.rows if row["workload"] == workload]
        table = Table("measure", *(show_name(row) for row in rows), title=workload, box=box.SIMPLE)
        for header, show in COLUMNS[1:]:
            table.add_row(header, *(show(row) for row in rows))
        tables.append(table)
    return tables


def show_name(row: dict[str, Any]) -> str:
    """The system, with a mark where its exits are forced."""
    return str(row["system"]) + (" *" if row.get("forced_exits") else "")


def markdown(results: Results, header: dict[str, Any], limit: float | None = None) -> str:
    """The same in Markdown, with what a reader must know to trust it.

    Args:
        results: of a run.
        header: its provenance.
        limit: seconds, p95 between tokens; adds the best throughput within.
    """
    parts = []
    for workload in workloads_of(results):
        rows = [row for row in results.rows if row["workload"] == workload]
        first = rows[0]
        parts.append(
            f"**{workload}**: {first['requests']} requests, {first['prompt_tokens']:,} prompt and "
            f"{first['output_tokens']:,} new tokens, {first['rounds']} rounds\n"
        )
        lines = [[name for name, _ in COLUMNS], ["---"] * len(COLUMNS)]
        for row in rows:
            cells = [show(row) for _, show in COLUMNS]
            lines.append([show_name(row), *cells[1:]])
        parts.append("\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n")
    if limit is not None:
        parts.append("\n".join(limit_lines(results, limit)) + "\n")
    parts.append("\n".join(notes(results)) + "\n")
    load = " to ".join(f"{value:.2f}" for value in results.load)
    versions = ", ".join(f"{name} {number}" for name, number in header["versions"].items())
    parts.append(
        f"`{header['command']}` at commit {header['commit']}, {header['machine']}; {versions}; "
        f"average load {load}.\n"
    )
    return "\n".join(parts)


def notes(results: Results) -> list[str]:
    """What could not run, what differs, what is forced."""
    said = []
    if any(row.get("forced_exits") for row in results.rows):
        said.append("\\* random weights; exits are forced to shares of (R - i) / R per depth.")
    said += [f"Could not run: {reason}." for reason in results.left_out.values()]
    for check in results.checks:
        if check.wrong:
            said.append(
                f"Warning: {check.system} differs from our vanilla's greedy tokens in "
                f"{check.wrong} of {check.requests} requests."
            )
    return said


def limit_lines(results: Results, limit: float) -> list[str]:
    """Per system: the best tokens per second whose p95 between tokens is within ``limit``."""
    lines = [f"Most tokens/s with p95 between tokens within {limit * 1e3:g} ms:", ""]
    for system in dict.fromkeys(row["system"] for row in results.rows):
        points = [
            (row["tokens_per_s"], row["between_tokens_p95_s"])
            for row in results.rows
            if row["system"] == system
        ]
        best = best_within(points, limit)
        lines.append(f"- {system}: " + ("none is" if best is None else f"{best:,.1f}"))
    return lines


def curve_table(results: Results, systems: Sequence[str]) -> Table:
    """Tokens per second and p95 between tokens by number of clients."""
    table = Table("clients", *systems, title="tokens/s @ p95 between tokens (ms)", box=box.SIMPLE)
    by_clients: dict[int, dict[str, str]] = {}
    for row in results.rows:
        text = f"{row['tokens_per_s']:,.0f} @ {_cell('between_tokens_p95_s', '.0f', 1e3)(row)}"
        by_clients.setdefault(row["clients"], {})[row["system"]] = text
    for clients, texts in sorted(by_clients.items()):
        table.add_row(str(clients), *(texts.get(name, "-") for name in systems))
    return table


def kernel_table(records: Sequence[dict[str, Any]]) -> Table:
    """Of ``mor bench kernels``: the machine's best in the title, a line per kernel and size."""
    best, *rest = records
    table = Table(
        *("kernel", "rows", "microseconds", "GFLOP/s", "GB/s", "of the best"),
        title=f"this machine's best on {best['threads']} thread(s): {best['gflop_per_s']:,.0f} "
        f"GFLOP/s in registers, {best['gb_per_s']:.1f} GB/s from memory",
        box=box.SIMPLE,
    )
    for row in rest:
        table.add_row(
            f"{row['kind']} {row['name']}",
            f"{row['rows']:,}",
            f"{row['us']:,.0f}",
            f"{row['gflop_per_s']:,.0f}",
            f"{row['gb_per_s']:.1f}" if row["gb_per_s"] else "-",
            f"{row['of_best']:.0%}",
        )
    return table
