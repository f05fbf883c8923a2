"""``mor recipes``."""

from __future__ import annotations

import typer

from mor.recipes import builtin_recipes


def recipes() -> None:
    """List the recipes that come with mor."""
    for name in builtin_recipes():
        typer.echo(name)
