"""``mor data``: prepare text, describe and verify a prepared folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, cast

import typer
from rich.console import Console
from rich.table import Table

from mor.data import SHARD_TOKENS, DataIndex, Limits, StreamOptions, console_progress
from mor.data import prepare as prepare_data
from mor.data.documents import describe_skipped
from mor.errors import Interrupted

app = typer.Typer(help="Prepare text for training, look at it, verify it.", no_args_is_help=True)


@app.command()
def prepare(
    source: Annotated[
        str,
        typer.Argument(
            help="'shakespeare', 'english', a file or folder (.txt, .md, .jsonl, .json, .parquet), "
            "task:NAME or hf:NAME"
        ),
    ],
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
        bool, typer.Option(help="leave out rows without text (null, broken) and count them")
    ] = False,
    seed: Annotated[int, typer.Option(help="which documents are held out")] = 0,
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
) -> None:
    """Read SOURCE, split it by document, tokenise it, write memory-mapped shards.

    Stopped by whatever, the same command goes on from the last finished shard.
    """
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
    describe(DataIndex.load(folder))


@app.command()
def verify(folder: Annotated[Path, typer.Argument(help="a prepared folder")]) -> None:
    """Check every byte of every shard against its checksum; damaged ones are named."""
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
