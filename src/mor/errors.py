"""The one base class of every error that a user's input can cause."""

from __future__ import annotations


class MorError(Exception):
    """A mistake in what was asked for: a file, a field, a value.

    The message names the field, the value found and what would be right. The command line prints
    it on one line and exits with 2; library callers catch it like any exception.
    """


class ConfigError(MorError, ValueError):
    """A field of a model's configuration is wrong; the message names it and what would be right."""
