"""``mor calibrate``."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Annotated, Any

import typer

from mor.cli.common import open_any_model, show_progress, tokenizer_for
from mor.cli.evaluate import BatchSize, Model, SeqLen, sequence_length
from mor.data import DataIndex, PackedDataset
from mor.data.media import MediaDataset
from mor.data.media.index import is_media
from mor.disk import check_new
from mor.errors import MorError
from mor.eval import calibrate as calibrate_model
from mor.eval.calibrate import count_ticks
from mor.eval.levels import FACTORS, calibrate_levels
from mor.folder.config import is_media_model
from mor.folder.levels import Levels
from mor.folder.tokenizer import load_tokenizer
from mor.hf.bos import record_bos, save_tokenizer
from mor.hf.convert.files import new_folder
from mor.model.routers import BoundaryRouter
from mor.run_files import PROCESSORS, TOKENIZER, beside_model


def calibrate(
    model: Model,
    out: Annotated[Path, typer.Option(help="folder to write the recalibrated model to")],
    data: Annotated[
        Path | None, typer.Option(help="a folder made by `mor data prepare`; the sample is from it")
    ] = None,
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
    confidence: Annotated[
        float | None,
        typer.Option(help="of a router trained by gains: how sure it must be; needs no data"),
    ] = None,
) -> None:
    """Set the router's stored boundaries from a sample, at the same or at new capacities."""
    check_new(out)
    if confidence is not None:
        if data is not None or capacity is not None or levels:
            raise MorError("--confidence needs no sample: leave out --data, --capacity, --levels")
        _set_confidence(model, out, confidence)
        return
    if data is None:
        raise MorError("give --data, whose sample sets the boundaries, or --confidence")
    capacities = None if capacity is None else parse_capacities(capacity)
    media = is_media_model(model)
    if media and (levels or seq_len is not None):
        raise MorError("--levels and --seq-len are of models of texts; leave them out")
    if not media and is_media(data):
        raise MorError(
            f"{data} holds images or sounds, and the model in {model} is one of texts; give a "
            "folder of text, whose tokens then set the boundaries"
        )
    loaded = open_any_model(model)
    dataset: Any = None
    tokenizer = None
    if media:
        dataset = MediaDataset(data, split)
    else:
        length = sequence_length(model, loaded.config, seq_len, DataIndex.load(data))
        dataset = PackedDataset(data, split, length)
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
    _write(model, loaded, tokenizer, out, more)
    shown = ", ".join(f"{b:z.4f}" for b in boundaries)
    typer.echo(f"boundaries (logits, by depth): {shown}; written: {out}")


def _set_confidence(model: Path, out: Path, confidence: float) -> None:
    if not 0 < confidence < 1:
        raise MorError(f"confidence={confidence} must lie between 0 and 1, such as 0.15")
    loaded = open_any_model(model)
    router = loaded.model.router
    if not isinstance(router, BoundaryRouter):
        raise MorError(
            f"--confidence sets the boundary of a router trained by gains; {model} has router="
            f"{loaded.config.router!r}"
        )
    router.set_confidence(confidence)
    beside = beside_model(model, TOKENIZER)
    tokenizer = None if beside is None else load_tokenizer(beside.parent)
    _write(model, loaded, tokenizer, out, None)
    typer.echo(f"a token goes on where the router is surer than {confidence:g}; written: {out}")


def _write(model: Path, loaded: Any, tokenizer: Any, out: Path, levels: Levels | None) -> None:
    with new_folder(out) as folder:
        if tokenizer is not None:
            record_bos(loaded, tokenizer)
        loaded.save_pretrained(folder)
        if tokenizer is not None:
            save_tokenizer(tokenizer, loaded.config, folder)
        for name in PROCESSORS:
            if (beside := beside_model(model, name)) is not None:
                shutil.copyfile(beside, folder / name)
        if levels is not None:
            levels.save(folder)


def parse_capacities(text: str) -> list[float]:
    """The capacities in a text: ``1,0.5`` is [1.0, 0.5].

    Raises:
        typer.BadParameter: not a list of numbers.
    """
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise typer.BadParameter(f"capacity={text!r} must look like 1,0.5,0.25") from None
