"""``mor card``, and the card that ``mor train`` writes at the end."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mor.cli.common import open_any_model, open_model
from mor.cli.ranks import first_rank
from mor.errors import MorError
from mor.eval import write_card, write_folder_card
from mor.eval.keep import run_of
from mor.run_files import CONFIG, find_folder


def card(
    run: Annotated[
        Path, typer.Argument(help="a finished run, or a model converted, folded, calibrated")
    ],
    data: Annotated[
        Path | None,
        typer.Option(help="prepared data; default where a run's recipe says, else no scores"),
    ] = None,
    max_sequences: Annotated[
        int | None, typer.Option(min=1, help="validation sequences; default at most 64")
    ] = None,
) -> None:
    """Evaluate the model of RUN on a sample and write its model card (model/README.md)."""
    if run_of(run) is None and (find_folder(run) / CONFIG).is_file():
        more = {} if max_sequences is None else {"max_sequences": max_sequences}
        out = write_folder_card(run, model=open_model(run), data=data, **more)
    else:
        out = write_card(run, model=open_any_model(run), data=data, max_sequences=max_sequences)
    typer.echo(f"written: {out}")


def card_after_training(run: Path) -> None:
    """Write the card on the first rank. A card that cannot be written never fails the training."""
    if not first_rank():
        return
    try:
        write_card(run, model=open_any_model(run))
    except (MorError, ValueError, RuntimeError) as error:
        typer.echo(f"no model card: {error}; mor card {run} writes it", err=True)
