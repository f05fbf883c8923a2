"""The application, and the one place where errors become messages."""

from __future__ import annotations

import sys
import warnings
from typing import Annotated

import typer

import mor
from mor.checks import is_on
from mor.cli.lazy import LazyGroup
from mor.cli.ranks import first_rank, rank
from mor.errors import Interrupted, MorError

app = typer.Typer(
    name="mor",
    cls=LazyGroup,
    help="Mixture-of-Recursions language models: train, evaluate, generate.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(mor.__version__)
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
) -> None:
    """Mixture-of-Recursions language models: train, evaluate, generate."""


@app.command()
def version() -> None:
    """Print the version."""
    typer.echo(mor.__version__)


def fail(message: str) -> None:
    """Print one line to standard error; brackets in it are text, not markup."""
    from rich.console import Console
    from rich.text import Text

    console = Console(stderr=True, soft_wrap=True, highlight=False)
    whose = "error: " if first_rank() else f"error on rank {rank()}: "
    console.print(Text(whose, style="red") + Text(" ".join(message.split()), style="default"))


# What torch says where a size cannot be had: each has words of its own, and no class.
_NO_ROOM = ("allocate memory", "out of memory", "overflow", "Storage size calculation")


def describe(error: Exception) -> str | None:
    """One sentence about a mistake of the user's; None for what can only be a fault of ours."""
    text = str(error) or type(error).__name__
    if isinstance(error, RecursionError):
        return "something is nested too deeply to be read"
    if isinstance(error, RuntimeError) and text.startswith("Symlink loop"):  # pathlib's, to 3.12
        return f"a symbolic link leads back to itself: {text}"
    if isinstance(error, MemoryError) or any(words in text for words in _NO_ROOM):
        return f"not enough memory for these sizes: {text.splitlines()[0]}"
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{error.strerror}: {error.filename!r}"
    return None if isinstance(error, RuntimeError) else text


def main() -> None:
    """Run a command: exit 0 when it worked, 2 on a mistake of the user's, 130 when interrupted.

    ValueError is how the network itself refuses an input (a token id out of range, a sequence past
    the maximum), OSError how the system refuses a file. With ``MOR_DEBUG=1`` errors keep their
    traceback, and Transformers says what it has to say.
    """
    debug = is_on("MOR_DEBUG", False)
    if not first_rank() and not sys.warnoptions:
        warnings.simplefilter("ignore")  # the first rank shows them
    try:
        app()
    except (MorError, ValueError, OSError, MemoryError, RuntimeError) as error:
        message = describe(error)
        if debug or message is None:
            raise
        if first_rank() or not isinstance(error, Interrupted):  # all ranks stop when asked to
            fail(message)
        sys.exit(130 if isinstance(error, Interrupted) else 2)
    except KeyboardInterrupt:
        if debug:
            raise
        typer.echo("interrupted", err=True)
        sys.exit(130)
