"""The application, and the one place where errors become messages."""

from __future__ import annotations

import os
import sys

import typer
from rich.console import Console
from rich.text import Text

import mor
from mor.cli import convert, data, demo, evaluate, generate, report, training
from mor.errors import MorError

app = typer.Typer(
    name="mor",
    help="Mixture-of-Recursions language models: train, evaluate, generate.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
app.add_typer(data.app, name="data")
app.add_typer(convert.app, name="convert")
for module in (training, evaluate, generate, report, demo):
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
    """Run a command: exit 0 when it worked, 2 on a mistake of the user's.

    With ``MOR_DEBUG=1`` errors keep their traceback.
    """
    try:
        app()
    except MorError as error:
        if os.environ.get("MOR_DEBUG"):
            raise
        fail(str(error))
        sys.exit(2)
