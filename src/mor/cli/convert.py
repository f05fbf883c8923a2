"""``mor convert``: checkpoints of others into ours."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import torch
import typer
from transformers.utils.logging import disable_progress_bar

from mor.disk import check_new
from mor.hf.convert.convert import convert_authors, convert_gguf, convert_llama
from mor.hf.convert.hub import fetch_checkpoint, looks_like_name

app = typer.Typer(help="Read checkpoints of others.", no_args_is_help=True, add_completion=False)


Dtype = Literal["float32", "bfloat16", "float16"]
Out = Annotated[Path, typer.Option(help="model folder to write")]


@app.callback()
def quiet() -> None:
    """Read checkpoints of others."""
    disable_progress_bar()  # one file is written: nothing to watch


@app.command()
def authors(
    weights: Annotated[Path, typer.Argument(help=".safetensors or .bin of the authors' code")],
    config: Annotated[Path, typer.Option(help="its JSON or YAML configuration")],
    out: Out,
) -> None:
    """A checkpoint of the paper's authors (vanilla, recursive, expert or token choice)."""
    typer.echo(f"converted: {convert_authors(weights, config, out)}")


@app.command()
def llama(
    folder: Annotated[
        str,
        typer.Argument(
            help="a Hugging Face folder or a name on the Hub: Llama, Mistral, Qwen2, Qwen3, SmolLM3"
        ),
    ],
    out: Out,
) -> None:
    """A checkpoint of Llama or a relative of the same layers, as a vanilla model."""
    check_new(out)  # before anything is downloaded
    found = fetch_checkpoint(folder) if looks_like_name(folder) else Path(folder).expanduser()
    typer.echo(f"converted: {convert_llama(found, out)}")


@app.command()
def gguf(
    file: Annotated[Path, typer.Argument(help="a .gguf file of a Llama-like model")],
    out: Out,
    dtype: Annotated[Dtype, typer.Option(help="of the weights written")] = "float32",
) -> None:
    """A GGUF file, de-quantised, as a vanilla model with its tokenizer and chat template."""
    typer.echo(f"converted: {convert_gguf(file, out, getattr(torch, dtype))}")
