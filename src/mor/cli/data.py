"""``mor data``: prepare text, describe and verify a prepared folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, cast

import typer
from rich.console import Console
from rich.table import Table

from mor.checks import MAX_SEED
from mor.data import SHARD_TOKENS, DataIndex, Limits, StreamOptions, console_progress
from mor.data import prepare as prepare_data
from mor.data.documents import describe_skipped
from mor.data.media import MEDIA_SOURCES, MediaIndex, MediaOptions, prepare_media
from mor.data.media.features import FrameSettings
from mor.data.media.index import SKIPPED_FILE, is_media
from mor.data.prepare import program_name
from mor.errors import Interrupted, MorError

app = typer.Typer(
    help="Prepare text for training, look at it, verify it.",
    no_args_is_help=True,
    add_completion=False,
)


@app.command()
def prepare(
    source: Annotated[
        str,
        typer.Argument(
            help="'shakespeare', 'english', a file or folder (.txt, .md, .jsonl, .json, .parquet), "
            "task:NAME or hf:NAME; images or sounds: images DIR, audio DIR, digits, animal-mnist, "
            "japanese-vowels, spoken-digits"
        ),
    ],
    folder: Annotated[
        Path | None, typer.Argument(help="of files, for 'images' and 'audio'")
    ] = None,
    *,
    out: Annotated[Path, typer.Option(help="folder to write")],
    vocab_size: Annotated[int, typer.Option(help="tokens of the byte-level BPE to train")] = 4096,
    tokenizer: Annotated[Path | None, typer.Option(help="use this tokenizer folder")] = None,
    validation_fraction: Annotated[
        float | None, typer.Option(help="share held out; default 0.05, of a stream 0.001")
    ] = None,
    text_field: Annotated[str, typer.Option(help="JSON field or column that is text")] = "text",
    bos: Annotated[
        str,
        typer.Option(help="BOS before documents: auto (as the tokenizer does), always or never"),
    ] = "auto",
    skip_bad_rows: Annotated[
        bool, typer.Option(help="leave out rows without text, or broken files, and count them")
    ] = False,
    seed: Annotated[
        int, typer.Option(min=0, max=MAX_SEED, help="which documents are held out")
    ] = 0,
    overwrite: Annotated[bool, typer.Option(help="replace another preparation")] = False,
    workers: Annotated[int, typer.Option(help="processes that tokenise; same result")] = 1,
    shard_tokens: Annotated[int, typer.Option(help="tokens of a full shard")] = SHARD_TOKENS,
    stream: Annotated[
        bool, typer.Option(help="read once, without looking for copies; always so for hf:")
    ] = False,
    max_documents: Annotated[int | None, typer.Option(help="stop a stream there")] = None,
    max_tokens: Annotated[int | None, typer.Option(help="stop a stream there")] = None,
    hf_config: Annotated[str | None, typer.Option(help="part of the dataset")] = None,
    hf_split: Annotated[str, typer.Option(help="split of the dataset to read")] = "train",
    hf_validation_split: Annotated[
        str | None, typer.Option(help="split to validate on; else a part of --hf-split")
    ] = None,
    hf_revision: Annotated[
        str | None, typer.Option(help="commit of the dataset; else the present one")
    ] = None,
    test_fraction: Annotated[
        float, typer.Option(help="images, sounds: share of each class kept to test on")
    ] = 0.2,
    size: Annotated[
        str, typer.Option(help="images: pixels that each is brought to, 32 or 24x48 (rows first)")
    ] = "32",
    fit: Annotated[
        str, typer.Option(help="images: crop what stands out, or squeeze the proportions")
    ] = "crop",
    channels: Annotated[int, typer.Option(help="images: 3 for colours, 1 for grey")] = 3,
    sampling_rate: Annotated[int, typer.Option(help="sounds: samples per second")] = 16_000,
    mels: Annotated[int, typer.Option(help="sounds: numbers of a frame")] = 40,
    max_seconds: Annotated[float, typer.Option(help="sounds: longer ones are refused")] = 60.0,
    label_field: Annotated[
        str, typer.Option(help="images, sounds: column of metadata.csv that is the class")
    ] = "label",
) -> None:
    """Read SOURCE, split it by document, tokenise it, write memory-mapped shards.

    Stopped by whatever, the same command goes on from the last finished shard. Images and sounds
    are decoded and written whole, or not at all.
    """
    if source in MEDIA_SOURCES:
        media = MediaOptions(
            validation_fraction=0.1 if validation_fraction is None else validation_fraction,
            test_fraction=test_fraction,
            seed=seed,
            **dict(zip(("height", "width"), _read_size(size), strict=True)),
            fit=cast("Any", fit),  # it is checked there
            channels=channels,
            frames=FrameSettings(sampling_rate, mels),
            max_seconds=max_seconds,
            label_field=label_field,
            skip_bad=skip_bad_rows,
        )
        with console_progress() as progress:
            made = prepare_media(
                source,
                out,
                folder=folder,
                options=media,
                overwrite=overwrite,
                program=program_name(),
                progress=progress,
            )
        typer.echo(f"{'already prepared' if made.reused else 'prepared'}: {out}")
        describe_media(made)
        return
    if folder is not None:
        raise MorError(f"{str(folder)!r}: source {source} takes no folder; known: images, audio")
    limits = Limits(max_documents, max_tokens)
    options = StreamOptions(limits, hf_config, hf_split, hf_validation_split, hf_revision)
    try:
        with console_progress() as progress:
            index = prepare_data(
                source,
                out,
                vocab_size=vocab_size,
                tokenizer=tokenizer,
                validation_fraction=validation_fraction,
                shard_tokens=shard_tokens,
                text_field=text_field,
                bos=cast("Any", bos),  # it is checked there
                skip_bad_rows=skip_bad_rows,
                seed=seed,
                stream=options if stream or options != StreamOptions() else False,
                workers=workers,
                overwrite=overwrite,
                progress=progress,
            )
    except KeyboardInterrupt:
        raise Interrupted(
            f"stopped; the finished shards of {out} are kept, and the same command goes on from "
            "there"
        ) from None
    typer.echo(f"{'already prepared' if index.reused else 'prepared'}: {out}")
    describe(index)


@app.command()
def info(folder: Annotated[Path, typer.Argument(help="a prepared folder")]) -> None:
    """Say what a prepared folder holds."""
    if is_media(folder):
        describe_media(MediaIndex.load(folder))
        return
    describe(DataIndex.load(folder))


@app.command()
def verify(folder: Annotated[Path, typer.Argument(help="a prepared folder")]) -> None:
    """Check every byte of every shard against its checksum; damaged ones are named."""
    if is_media(folder):
        media = MediaIndex.load(folder)
        media.verify()
        for part in media.splits.values():
            typer.echo(f"ok {part.file}")
        return
    index = DataIndex.load(folder)
    with console_progress() as progress:
        index.verify_all(progress)
    for split in index.splits:
        for shard in index.shards(split):
            typer.echo(f"ok {shard.file}")


def describe(index: DataIndex) -> None:
    """Print tokens, documents and bytes per split, what documents begin with, what is left out."""
    table = Table("split", "documents", "tokens", "bytes", "bytes per token")
    for split in index.splits:
        table.add_row(
            split,
            f"{index.num_documents(split):,}",
            f"{index.num_tokens(split):,}",
            f"{index.num_bytes(split):,}",
            f"{index.bytes_per_token(split):.3f}",
        )
    Console().print(table)
    old = "" if index.add_bos_token is not None else " (made before that was recorded)"
    typer.echo(f"documents {index.bos.describe()}{old}")
    left = [(index.num_duplicates, "exact copies"), (index.num_empty, "documents without text")]
    for count, what in left:
        if count:
            typer.echo(f"left out: {count:,} {what}")
    if index.skipped:
        typer.echo(describe_skipped(index.skipped))


def describe_media(index: MediaIndex) -> None:
    """Print the examples of each split, their size, the classes, and what was left out."""
    images = index.kind == "images"
    table = Table("split", "images" if images else "sounds", *(() if images else ("frames",)))
    for name, split in index.splits.items():
        row = [f"{split.examples:,}"] + ([] if split.frames is None else [f"{split.frames:,}"])
        table.add_row(name, *row)
    Console().print(table)
    size = " x ".join(map(str, index.shape))
    each = f"images of {size}" if images else f"frames of {size}, {index.max_frames} at most"
    typer.echo(f"{each}; {len(index.classes)} classes: {', '.join(index.classes)}")
    if index.num_duplicates:
        typer.echo(f"left out: {index.num_duplicates:,} exact copies")
    if index.skipped:
        typer.echo(f"left out: {index.skipped:,} files, see {index.directory / SKIPPED_FILE}")


def _read_size(size: str) -> tuple[int, int]:
    """Rows and columns out of `32` or `24x48`. Raises `MorError`."""
    parts = size.lower().split("x")
    if len(parts) > 2 or not all(part.isascii() and part.isdigit() for part in parts):
        raise MorError(f"size={size!r} must be a number of pixels, or rows x columns such as 24x48")
    return int(parts[0]), int(parts[-1])
