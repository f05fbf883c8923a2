"""The command ``mor``: data, train, eval, generate, convert, calibrate, report, demo."""

from mor.cli.app import app, main

__all__ = ["app", "main"]
