"""The comparison table, and in words what depth buys.

One list of columns (:func:`columns`) is the only definition of a row; the terminal, Markdown, CSV
and HTML tables are all made from it.
"""

from __future__ import annotations

import csv
import io
import math
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from mor.report.records import Run

Value = str | int | float | None

# Two NLLs that agree in every digit the tables show are called equal.
NLL_DIGITS = 4


@dataclass(frozen=True)
class Column:
    """One column: its header (what, unit), the value of a run, and how the value is printed."""

    header: str
    value: Callable[[Run], Value]
    show: Callable[[Value], str]

    def text(self, run: Run) -> str:
        """Return the printed cell, ``-`` where the run has no such number."""
        value = self.value(run)
        return "-" if value is None else self.show(value)


def columns(runs: Sequence[Run]) -> list[Column]:
    """Return the columns of the table; as many depth caps as the deepest run was scored at."""
    caps = sorted({cap.max_depth for run in runs if run.eval for cap in run.eval.depth_cap} | {1})
    return [
        Column("run", lambda run: run.label, str),
        Column("unique parameters (M)", lambda run: _scaled(run.summary.parameters, 1e6), _number),
        Column("tokens seen (M)", lambda run: _scaled(run.summary.tokens, 1e6), _number),
        Column("training speed (tokens per s)", lambda run: run.summary.tokens_per_s, _whole),
        Column(
            "peak memory (MiB)",
            lambda run: _scaled(run.summary.peak_memory_bytes, 2**20),
            _whole,
        ),
        Column(
            "causal NLL (nats per token)",
            lambda run: run.eval.causal.nll if run.eval else None,
            _nll,
        ),
        Column(
            "leaky NLL, not causal: looks ahead (nats per token)",
            lambda run: run.eval.leaky.nll if run.eval and run.eval.leaky else None,
            _nll,
        ),
        *(_cap_column(cap) for cap in caps),
        Column(
            "mean depth (recursions per token)",
            lambda run: run.eval.causal.mean_depth if run.eval else None,
            lambda value: f"{value:z.2f}",
        ),
        Column("training FLOPs", lambda run: run.summary.train_flops, lambda value: f"{value:.2e}"),
    ]


def rich_table(runs: Sequence[Run], width: int | None = None) -> Table:
    """Return the table for the terminal.

    One row per run where that fits into ``width`` characters (default: the terminal's), else one
    column per run.
    """
    cols = columns(runs)
    wide = Table(box=box.SIMPLE_HEAD, title="Runs compared", title_style="bold")
    for index, column in enumerate(cols):
        # Headers break between words; numbers and names stay whole.
        room = max(9, *(len(column.text(run)) for run in runs))
        header = textwrap.fill(column.header, room, break_long_words=False)
        wide.add_column(Text(header), justify="right" if index else "left", vertical="bottom")
    for run in runs:
        wide.add_row(*(Text(column.text(run)) for column in cols))
    console = Console(width=width)
    endless = console.options.update(width=10_000)
    if console.measure(wide, options=endless).maximum <= console.width:
        return wide
    tall = Table(box=box.SIMPLE_HEAD, title="Runs compared", title_style="bold")
    tall.add_column("", min_width=12, overflow="fold")
    for run in runs:
        tall.add_column(Text(run.label), justify="right", overflow="fold")
    for column in cols[1:]:
        tall.add_row(Text(column.header), *(Text(column.text(run)) for run in runs))
    return tall


def markdown_table(runs: Sequence[Run]) -> str:
    """Return the table in Markdown, ending with a newline."""
    cols = columns(runs)
    lines = [
        [column.header for column in cols],
        ["---" if index == 0 else "---:" for index in range(len(cols))],
        *([column.text(run).replace("|", "\\|") for column in cols] for run in runs),
    ]
    return "".join("| " + " | ".join(map(_one_line, cells)) + " |\n" for cells in lines)


def csv_table(runs: Sequence[Run]) -> str:
    """Return the table as CSV with every digit; an empty cell where a number does not exist."""
    cols = columns(runs)
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(column.header for column in cols)
    for run in runs:
        writer.writerow(column.value(run) for column in cols)
    return out.getvalue()


def depth_gain(run: Run) -> float | None:
    """Return NLL at depth cap 1 minus NLL at cap ``num_recursions`` (nats/token, causal).

    Positive where depth lowers the NLL; None where either was not measured or R is 1.
    """
    one, full = run.nll_at_cap(1), run.nll_at_cap(run.summary.num_recursions)
    if run.summary.num_recursions == 1 or one is None or full is None:
        return None
    return one - full


def depth_sentence(run: Run) -> str:
    """Say in one sentence what the recursions after the first buy this run."""
    depth, gain = run.summary.num_recursions, depth_gain(run)
    if depth == 1:
        return f"{run.label}: one pass through its layers, so there is no depth to cap."
    if gain is None:
        return f"{run.label}: not scored at depth caps 1 and {depth}."
    measured = f"NLL {_nll(run.nll_at_cap(1))} at depth cap 1, {_nll(run.nll_at_cap(depth))} at"
    start = f"{run.label}: {measured} {depth}; "
    if not math.isfinite(gain):
        return start + "one of them is no finite number, so nothing can be said of depth."
    size = f"{abs(gain):z.{NLL_DIGITS}f}"
    if float(size) == 0:
        return start + f"depth buys nothing that {NLL_DIGITS} decimals show."
    if gain > 0:
        part = f"perplexity falls by {-math.expm1(-gain):z.2%}"
        return start + f"depth lowers the NLL by {size} nats per token ({part})."
    part = f"perplexity rises by {math.expm1(-gain):z.2%}"
    return start + f"depth raises the NLL by {size} nats per token ({part}): it does harm here."


def notes(runs: Sequence[Run]) -> list[str]:
    """Return what a reader must know before comparing: conditions that differ between the runs."""
    said = []
    flops = [run.summary.train_flops for run in runs if run.summary.train_flops]
    if flops and max(flops) > 1.02 * min(flops):
        said.append(
            f"Training FLOPs differ by a factor of {max(flops) / min(flops):z.2f}: "
            "the NLLs are not at equal compute."
        )
    sets = {(run.eval.data, run.eval.split, run.eval.tokens) for run in runs if run.eval}
    if len(sets) > 1:
        said.append("The runs were not all scored on the same tokens: their NLLs do not compare.")
    if len({run.summary.machine for run in runs}) > 1:
        said.append("The runs come from different machines: speed and memory do not compare.")
    if any(run.eval and run.eval.leaky for run in runs):
        said.append(
            "Leaky NLL selects tokens as in training, by looking at later tokens of the text; "
            "no model can generate that way. Every other NLL is causal."
        )
    said.append("Each run was trained once, with one seed: differences carry no error bars.")
    return said


def _cap_column(cap: int) -> Column:
    return Column(f"NLL, depth cap {cap} (nats per token)", lambda run: run.nll_at_cap(cap), _nll)


def _scaled(value: float | None, unit: float) -> float | None:
    return None if value is None else value / unit


def _number(value: Value) -> str:
    """Print at least three digits, and no more decimals than that takes."""
    size = abs(float(value or 0))
    return f"{value:z,.{0 if size >= 100 else 1 if size >= 10 else 2 if size >= 1 else 3}f}"


def _whole(value: Value) -> str:
    return f"{value:z,.0f}"


def _nll(value: Value) -> str:
    return f"{value:z.{NLL_DIGITS}f}"


def _one_line(text: str) -> str:
    return " ".join(text.split())
