"""``mor compress``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mor.checks import MAX_SEED
from mor.compress import Compression, Goal, Settings
from mor.data import console_progress
from mor.errors import Interrupted


def compress(
    source: Annotated[
        str,
        typer.Argument(
            help="a model folder (ours or Hugging Face), a GGUF file, a name on the Hub"
        ),
    ],
    out: Annotated[Path, typer.Option(help="folder to make; the model is in its `model`")],
    ratio: Annotated[
        float | None, typer.Option(help="weights of the result as a share of the source's")
    ] = None,
    speed: Annotated[
        float | None, typer.Option(help="the source's FLOPs per token over the result's")
    ] = None,
    data: Annotated[
        str, typer.Option(help="texts, or any source of mor data prepare, or a prepared folder")
    ] = "shakespeare",
    tokens: Annotated[float, typer.Option(help="to train on; more is better")] = 1e6,
    route: Annotated[
        bool, typer.Option(help="also let a router skip second passes, in a last stage")
    ] = False,
    seq_len: Annotated[int, typer.Option(help="tokens per sequence")] = 512,
    batch_size: Annotated[int, typer.Option(help="sequences per step")] = 4,
    learning_rate: Annotated[float, typer.Option(help="at its highest")] = 1e-3,
    sample_tokens: Annotated[
        int, typer.Option(help="held-out tokens that models are scored on")
    ] = 8192,
    seed: Annotated[int, typer.Option(min=0, max=MAX_SEED, help="of the training")] = 0,
) -> None:
    """Make SOURCE smaller or faster: choose layers, uptrain with SOURCE as teacher, report.

    Stopped at any moment, the same command goes on.
    """
    settings = Settings(
        source=source,
        out=out.expanduser(),
        goal=Goal(ratio, speed),
        data=data,
        tokens=tokens,
        route=route,
        seq_len=seq_len,
        batch_size=batch_size,
        learning_rate=learning_rate,
        seed=seed,
        sample_tokens=sample_tokens,
    )
    try:
        with console_progress() as progress:
            folder = Compression(settings, lambda line: typer.echo(line, err=True), progress).run()
    except (Interrupted, KeyboardInterrupt):  # a run in it would name --resume, which is not ours
        raise Interrupted(
            f"stopped; what is done is kept in {settings.out}, and the same command goes on"
        ) from None
    typer.echo((settings.out / "report.md").read_text(encoding="utf-8").split("---\n", 2)[-1])
    typer.echo(f"compressed: {folder}")
