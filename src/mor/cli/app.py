"""The application, and the one place where errors become messages."""

from __future__ import annotations

import os
import sys

import typer
from rich.console import Console
from rich.text import Text
from transformers.utils import logging

import mor
from mor.cli import (
    bench,
    card,
    convert,
    data,
    demo,
    evaluate,
    fold,
    generate,
    merge,
    report,
    serve,
    training,
    uptrain,
)
from mor.errors import MorError
from mor.train import Interrupted

app = typer.Typer(
    name="mor",
    help="Mixture-of-Recursions language models: train, evaluate, generate.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
app.add_typer(data.app, name="data")
app.add_typer(convert.app, name="convert")
app.add_typer(bench.app, name="bench")
for module in (training, uptrain, fold, evaluate, generate, serve, merge, report, card, demo):
    module.add_to(app)


@app.command()
def version() -> None:
    """Print the version."""
    typer.echo(mor.__version__)


def fail(message: str) -> None:
    """Print one line to standard error; brackets in it are text, not markup."""
    console = Console(stderr=True, soft_wrap=True, highlight=False)
    console.print(Text("error: ", style="red") + Text(" ".join(message.split()), style="default"))


def main() -> None:
    """Run a command: exit 0 when it worked, 2 on a mistake of the user's, 130 when interrupted.

    ValueError is how the network itself refuses an input (a token id out of range, a sequence past
    the maximum), OSError how the system refuses a file. With ``MOR_DEBUG=1`` errors keep their
    traceback.
    """
    debug = bool(os.environ.get("MOR_DEBUG"))
    if not debug:
        logging.set_verbosity_error()
        logging.disable_progress_bar()
    try:
        app()
    except (MorError, ValueError, OSError) as error:
        if debug:
            raise
        fail(str(error) or type(error).__name__)
        sys.exit(130 if isinstance(error, Interrupted) else 2)
