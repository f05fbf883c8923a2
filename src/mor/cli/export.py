"""``mor export``: our models for others' programs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import torch
import typer
from transformers.utils.logging import disable_progress_bar

app = typer.Typer(
    help="Write models for other programs: Transformers without mor, Llama, GGUF.",
    no_args_is_help=True,
)

Model = Annotated[Path, typer.Argument(help="model folder or run folder")]
Depth = Annotated[
    int | None, typer.Option(min=1, help="recursions of every token; default the model's own")
]
Dtype = Literal["float32", "bfloat16", "float16"]


@app.callback()
def quiet() -> None:
    """Write models for other programs: Transformers without mor, Llama, GGUF."""
    disable_progress_bar()


@app.command()
def hf(
    model: Model,
    out: Annotated[Path, typer.Option(help="folder to write")],
) -> None:
    """Any model with its code, for Transformers without mor (trust_remote_code=True)."""
    from mor.hf.export.remote import export_hf

    typer.echo(f"exported: {export_hf(model, out)}")


@app.command()
def llama(
    model: Model,
    out: Annotated[Path, typer.Option(help="folder to write")],
    depth: Depth = None,
    dtype: Annotated[Dtype | None, typer.Option(help="default that of the folder")] = None,
) -> None:
    """A model of fixed depth (router-free) as a plain Llama folder, its layers repeated."""
    from mor.hf.export.llama import export_llama

    wanted = None if dtype is None else getattr(torch, dtype)
    typer.echo(f"exported: {export_llama(model, out, depth, wanted)}")


@app.command()
def gguf(
    model: Model,
    out: Annotated[Path, typer.Option(help=".gguf file to write")],
    depth: Depth = None,
    dtype: Annotated[Dtype, typer.Option(help="of the matrices")] = "float32",
) -> None:
    """A model of fixed depth as a GGUF file, for llama.cpp and what is built on it."""
    from mor.hf.export.gguf import export_gguf

    typer.echo(f"exported: {export_gguf(model, out, depth, getattr(torch, dtype))}")
