"""``mor merge``: a checkpoint, sharded or not, as one model folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

from mor.config import MoRConfig
from mor.data import Bos, DataIndex
from mor.data import load_tokenizer as load_data_tokenizer
from mor.disk import replace_folder
from mor.errors import MorError, describe_missing
from mor.folder.tokenizer import load_tokenizer
from mor.hf.bos import save_tokenizer
from mor.run_files import CHECKPOINTS, CONFIG, RECIPE, refuse_adapter
from mor.train import parse_recipe
from mor.train.state import checkpoints, sharded


def merge(
    checkpoint: Annotated[
        Path, typer.Argument(help="RUN/checkpoints/checkpoint-N, or RUN for its newest one")
    ],
    out: Annotated[Path, typer.Option(help="folder to write; it must not exist")],
    tokenizer: Annotated[
        Path | None,
        typer.Option(help="folder of the tokenizer; default: that of the run's data"),
    ] = None,
) -> None:
    """Write a checkpoint of any number of ranks as a model folder with one safetensors file."""
    if (checkpoint / CHECKPOINTS).is_dir():
        newest = checkpoints.newest(checkpoint / CHECKPOINTS)
        if newest is None:
            raise MorError(
                f"{checkpoint / CHECKPOINTS} holds no checkpoint (train.save_steps saves some)"
            )
        checkpoint = newest
    if not checkpoint.is_dir():
        raise MorError(f"checkpoint {str(checkpoint)!r} {describe_missing(checkpoint)}")
    refuse_adapter(checkpoint)
    if not (checkpoint / CONFIG).is_file():
        raise MorError(f"{checkpoint} is no checkpoint: {CONFIG} is missing")
    sealed = (checkpoint / checkpoints.MANIFEST).is_file()
    wrong = checkpoints.damage(checkpoint) if sealed else None
    if wrong is not None:
        raise MorError(f"{checkpoint} is damaged: {wrong}; merge another checkpoint")
    if out.exists():
        raise MorError(f"out={out} exists already; choose another name")
    words, bos = (
        _tokenizer_of(checkpoint) if tokenizer is None else (load_tokenizer(tokenizer), None)
    )
    with replace_folder(out) as fresh:
        sharded.merge(checkpoint, fresh, bos)
        save_tokenizer(words, MoRConfig.from_pretrained(fresh), fresh)
    typer.echo(f"merged: {out}")


def _tokenizer_of(checkpoint: Path) -> tuple[Any, Bos]:
    """The tokenizer of the data that the run was trained on, and what its documents begin with."""
    path = checkpoint.absolute().parent.parent / RECIPE
    try:
        recipe = parse_recipe(yaml.safe_load(path.read_text(encoding="utf-8")), str(path))
        index = DataIndex.load(recipe.data.folders[0][0])
        return load_data_tokenizer(index.tokenizer_dir), index.known_bos()
    except (OSError, ValueError, yaml.YAMLError, MorError) as error:
        raise MorError(
            f"the tokenizer of {checkpoint} cannot be found ({error}); name its folder with "
            "--tokenizer"
        ) from None
