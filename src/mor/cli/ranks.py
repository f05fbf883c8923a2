"""Commands that several processes run at once ("ranks", under torchrun) speak once."""

from __future__ import annotations

import os

import typer


def rank() -> int:
    """The number of this process among those that torchrun started; 0 where it runs alone."""
    text = os.environ.get("RANK", "0")
    return int(text) if text.isdecimal() else 0


def first_rank() -> bool:
    """Whether this process speaks for all of them."""
    return rank() == 0


def say(message: str, *, err: bool = False) -> None:
    """Print a line that all ranks would print, on the first."""
    if first_rank():
        typer.echo(message, err=err)
