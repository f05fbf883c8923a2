"""``mor data``: prepare text, describe and verify a prepared folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from mor.data import DataIndex, console_progress
from mor.data import prepare as prepare_data

app = typer.Typer(help="Prepare text for training, look at it, verify it.", no_args_is_help=True)


@app.command()
def prepare(
    source: Annotated[str, typer.Argument(help="'shakespeare', or a .txt/.md/.jsonl file/folder")],
    out: Annotated[Path, typer.Option(help="folder to write")],
    vocab_size: Annotated[int, typer.Option(help="tokens of the byte-level BPE to train")] = 4096,
    tokenizer: Annotated[Path | None, typer.Option(help="use this tokenizer folder")] = None,
    validation_fraction: Annotated[float, typer.Option(help="share of bytes held out")] = 0.05,
    text_field: Annotated[str, typer.Option(help="field of a JSON line that is text")] = "text",
    seed: Annotated[int, typer.Option(help="which documents are held out")] = 0,
    overwrite: Annotated[bool, typer.Option(help="replace another preparation")] = False,
) -> None:
    """Read SOURCE, split it by document, tokenise it, write memory-mapped shards."""
    with console_progress() as progress:
        index = prepare_data(
            source,
            out,
            vocab_size=vocab_size,
            tokenizer=tokenizer,
            validation_fraction=validation_fraction,
            text_field=text_field,
            seed=seed,
            overwrite=overwrite,
            progress=progress,
        )
    typer.echo(f"{'already prepared' if index.reused else 'prepared'}: {out}")
    describe(index)


@app.command()
def info(folder: Annotated[Path, typer.Argument(help="a prepared folder")]) -> None:
    """Say what a prepared folder holds."""
    describe(DataIndex.load(folder))


@app.command()
def verify(folder: Annotated[Path, typer.Argument(help="a prepared folder")]) -> None:
    """Check every shard against its checksum; a damaged one is named."""
    for shard in DataIndex.load(folder).verify():
        typer.echo(f"ok {shard.file}")


def describe(index: DataIndex) -> None:
    """Print tokens, documents and bytes per split."""
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
