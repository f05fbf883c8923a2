"""``mor curves``: what one checkpoint scores at many depths and capacities."""

from __future__ import annotations

import json
from collections.abc import Container
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from mor.checks import check_real
from mor.cli.common import open_model, show_progress, tokenizer_for
from mor.cli.evaluate import BatchSize, SeqLen, find_held_out, sequence_length
from mor.data import DataIndex, PackedDataset
from mor.disk import check_folder
from mor.errors import MorError
from mor.eval.elastic import CAPACITIES, Point, has_capacity, measure_elastic
from mor.eval.evaluate import check_data
from mor.folder.levels import load_levels
from mor.provenance import provenance
from mor.report.style import require_matplotlib
from mor.study import tables
from mor.study.curves import TOLERANCE, curve_records, curve_table, range_table, write_curves

DEFAULT_CAPACITIES = ",".join(f"{factor:g}" for factor in CAPACITIES)


def curves(
    models: Annotated[list[Path], typer.Argument(help="model or run folders, or models that ship")],
    data: Annotated[
        Path | None,
        typer.Option(help="a folder made by `mor data prepare`; a model that ships has its own"),
    ] = None,
    split: Annotated[str, typer.Option(help="which split to score")] = "validation",
    capacities: Annotated[
        str, typer.Option(help="factors on the trained capacities; empty for none")
    ] = DEFAULT_CAPACITIES,
    seq_len: SeqLen = None,
    max_sequences: Annotated[
        int | None, typer.Option(min=1, help="default: the whole split")
    ] = None,
    batch_size: BatchSize = 8,
    tolerance: Annotated[
        float, typer.Option(help="nats that a range of FLOPs may cost")
    ] = TOLERANCE,
    out: Annotated[
        Path | None, typer.Option(help="folder for curves.jsonl, a table, the plot and a page")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON lines only")] = False,
) -> None:
    """NLL (of a task: exact answers too) against executed FLOPs, for depth caps and capacities.

    Models trained for one depth stand beside a checkpoint that serves many. Capacities come from
    the levels beside a model (`mor calibrate --levels`), else from the data's training split.
    """
    check_real("tolerance", tolerance, 0.0)
    factors = parse_factors(capacities)
    if out is not None:
        require_matplotlib()
        check_folder(out)
    folder = find_held_out(models[0]) if data is None else data
    found: dict[str, list[Point]] = {}
    for path in models:
        found[distinct_name(path, found)] = _measure(
            path, folder, split, factors, seq_len, max_sequences, batch_size
        )
    if as_json:
        origin = provenance()
        for record in curve_records(found):
            typer.echo(json.dumps(record | {"provenance": origin}))
    else:
        for table in (curve_table(found), range_table(found, tolerance)):
            if table.rows:
                show(table)
    if out is not None:
        typer.echo(f"page: {write_curves(found, out, tolerance)}", err=as_json)


def show(table: tables.Table) -> None:
    """Print a table."""
    drawn = Table(*table.columns, title=table.title, caption=table.note)
    for row in table.rows:
        drawn.add_row(*row)
    Console().print(drawn, markup=False)


def parse_factors(text: str) -> list[float]:
    """`0.2,1` as [0.2, 1.0]; an empty text is none.

    Raises:
        MorError: no list of numbers above 0.
    """
    try:
        factors = [float(part) for part in text.split(",")] if text.strip() else []
    except ValueError:
        factors = [-1.0]
    if not all(0 < factor < float("inf") for factor in factors):
        raise MorError(f"capacities={text!r} must look like 0.2,0.6,1: numbers above 0")
    return sorted(set(factors))


def distinct_name(path: Path, taken: Container[str]) -> str:
    """The folder's name; with its parent, then with a number, where that is taken."""
    name = path.name if path.name != "model" else path.resolve().parent.name
    if name in taken:
        name = str(path)
    number, free = 2, name
    while free in taken:
        free, number = f"{name} #{number}", number + 1
    return free


def _measure(
    path: Path,
    data: Path,
    split: str,
    factors: list[float],
    seq_len: int | None,
    max_sequences: int | None,
    batch_size: int,
) -> list[Point]:
    model, index = open_model(path), DataIndex.load(data)
    tokenizer = tokenizer_for(path, index)
    length = sequence_length(path, model.config, seq_len, index)
    dataset = PackedDataset(data, split, length)
    check_data(model, dataset, tokenizer)
    levels, sample = load_levels(path), None
    wanted = factors if has_capacity(model) else []
    if levels is not None and not all(levels.lowest <= f <= levels.highest for f in wanted):
        levels = None  # those that are asked for are calibrated here
    if wanted and levels is None:
        if split == "train":
            raise MorError(
                f"split={split!r}: {path} has no levels for these capacities, and would be "
                "calibrated on the text that it is scored on; run mor calibrate --levels first"
            )
        sample = PackedDataset(data, "train", length)
    count = len(dataset) if max_sequences is None else min(max_sequences, len(dataset))
    settings = model.config.num_recursions + len(wanted)
    with show_progress(f"scoring {path.name}", settings * -(-count // batch_size)) as tick:
        return measure_elastic(
            model,
            dataset,
            levels=levels,
            sample=sample,
            capacities=wanted,
            max_sequences=max_sequences,
            batch_size=batch_size,
            tick=tick,
        )
