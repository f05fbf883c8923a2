"""``mor calibrate``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from mor.cli.common import open_model, show_progress, tokenizer_for
from mor.cli.evaluate import BatchSize, Data, Model, SeqLen, sequence_length
from mor.data import PackedDataset
from mor.disk import check_new
from mor.eval import calibrate as calibrate_model
from mor.eval.calibrate import count_ticks
from mor.eval.levels import FACTORS, calibrate_levels
from mor.hf.bos import record_bos, save_tokenizer
from mor.hf.convert.files import new_folder


def calibrate(
    model: Model,
    data: Data,
    out: Annotated[Path, typer.Option(help="folder to write the recalibrated model to")],
    capacity: Annotated[
        str | None, typer.Option(help="new capacities, e.g. 1,0.5,0.25; default the model's")
    ] = None,
    split: Annotated[str, typer.Option(help="which split to calibrate on")] = "train",
    seq_len: SeqLen = None,
    max_sequences: Annotated[int, typer.Option(min=1, help="sequences of the sample")] = 64,
    batch_size: BatchSize = 8,
    levels: Annotated[
        bool, typer.Option(help="also at other capacities, for requests to mor serve")
    ] = False,
) -> None:
    """Set the router's stored boundaries from a sample, at the same or at new capacities."""
    check_new(out)
    capacities = None if capacity is None else parse_capacities(capacity)
    loaded = open_model(model)
    dataset = PackedDataset(data, split, sequence_length(model, loaded.config, seq_len))
    tokenizer = tokenizer_for(model, dataset.index)
    sample: dict[str, Any] = {"max_sequences": max_sequences, "batch_size": batch_size}
    count = min(max_sequences, len(dataset))
    shares = capacities or loaded.config.router_capacities or ()
    total = count_ticks(shares, count, batch_size) * (1 + levels * len(FACTORS))
    more = None
    with show_progress("calibrating", total) as tick:
        boundaries = calibrate_model(loaded, dataset, capacities=capacities, tick=tick, **sample)
        if levels:
            more = calibrate_levels(loaded, dataset, tick=tick, **sample)
    with new_folder(out) as folder:
        record_bos(loaded, tokenizer)
        loaded.save_pretrained(folder)
        save_tokenizer(tokenizer, loaded.config, folder)
        if more is not None:
            more.save(folder)
    shown = ", ".join(f"{b:z.4f}" for b in boundaries)
    typer.echo(f"boundaries (logits, by depth): {shown}; written: {out}")


def parse_capacities(text: str) -> list[float]:
    """The capacities in a text: ``1,0.5`` is [1.0, 0.5].

    Raises:
        typer.BadParameter: not a list of numbers.
    """
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise typer.BadParameter(f"capacity={text!r} must look like 1,0.5,0.25") from None
