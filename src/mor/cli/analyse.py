"""``mor analyse``: which tokens recurse, and whether it helped them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from mor.cli.common import open_model, show_progress, tokenizer_for
from mor.cli.curves import distinct_name, show
from mor.cli.evaluate import BatchSize, SeqLen, find_held_out, sequence_length
from mor.data import DataIndex, PackedDataset
from mor.disk import check_folder
from mor.errors import install_hint
from mor.eval.evaluate import check_data
from mor.eval.routes import collect_routes
from mor.eval.words import can_tag
from mor.provenance import provenance
from mor.report.style import require_matplotlib
from mor.study.analysis import (
    Analysed,
    describe_tokens,
    group_records,
    group_tables,
    router_record,
    router_table,
)
from mor.study.analysis_plots import write_analysis


def analyse(
    models: Annotated[
        list[Path], typer.Argument(help="routed models: model or run folders, or names that ship")
    ],
    data: Annotated[
        Path | None,
        typer.Option(help="a folder made by `mor data prepare`; a model that ships has its own"),
    ] = None,
    split: Annotated[str, typer.Option(help="which split")] = "validation",
    seq_len: SeqLen = None,
    max_sequences: Annotated[
        int, typer.Option(min=1, help="sequences of the sample, spread over the split")
    ] = 128,
    batch_size: BatchSize = 8,
    out: Annotated[
        Path | None, typer.Option(help="folder for tokens.jsonl, tables, plots and a page")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON lines only")] = False,
) -> None:
    """Which tokens recurse: by part of speech, place in the word, entropy; and what it gave.

    Parts of speech need the extra `analyse`.
    """
    if out is not None:
        require_matplotlib()
        check_folder(out)
    folder = find_held_out(models[0]) if data is None else data
    found: dict[str, Analysed] = {}
    for path in models:
        found[distinct_name(path, found)] = _analyse(
            path, folder, split, seq_len, max_sequences, batch_size
        )
    records = [router_record(name, model) for name, model in found.items()]
    records += [one for name, model in found.items() for one in group_records(name, model)]
    if as_json:
        origin = provenance()
        for record in records:
            typer.echo(json.dumps(record | {"provenance": origin}))
    else:
        for table in (router_table(records), *group_tables(records)):
            show(table)
    if not can_tag():
        typer.echo(
            f"no parts of speech: textblob is not installed ({install_hint('analyse')})", err=True
        )
    if out is not None:
        page = write_analysis(found, records, "Which tokens recurse", out)
        typer.echo(f"page: {page}", err=as_json)


def _analyse(
    path: Path,
    data: Path,
    split: str,
    seq_len: int | None,
    max_sequences: int,
    batch_size: int,
) -> Analysed:
    model = open_model(path)
    index = DataIndex.load(data)
    tokenizer = tokenizer_for(path, index)
    dataset = PackedDataset(data, split, sequence_length(path, model.config, seq_len, index))
    check_data(model, dataset, tokenizer)
    passes = model.config.num_recursions * -(-min(max_sequences, len(dataset)) // batch_size)
    with show_progress(f"reading {path.name}", passes) as tick:
        routes = collect_routes(
            model, dataset, max_sequences=max_sequences, batch_size=batch_size, tick=tick
        )
    return describe_tokens(routes, tokenizer)
