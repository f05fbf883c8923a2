"""The base class of every error that a user's input can cause, and what hints are made of."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path


class MorError(Exception):
    """A mistake in what was asked for: a file, a field, a value.

    The message names the field, the value found and what would be right. The command line prints
    it on one line and exits with 2; library callers catch it like any exception.
    """


class Interrupted(MorError):
    """Work ended early because it was asked to; the message says how to go on."""


class ConfigError(MorError, ValueError):
    """A field of a model's configuration is wrong; the message names it and what would be right."""


def install_hint(extra: str) -> str:
    """What to type to get the packages of an extra of ours, in any shell.

    The one place that says it. No package index has ``mor`` yet: it comes from a checkout.
    The quotes are for shells that take ``[...]`` for a pattern, zsh among them.
    """
    return f"pip install -e '.[{extra}]' in a checkout of mor"


def missing_package(what: str, package: str, extra: str) -> MorError:
    """The error to raise where a package of an extra is not installed."""
    return MorError(f"{what} the package {package}, which is not installed: {install_hint(extra)}")


def describe_missing(path: Path, wanted: str = "folder") -> str:
    """Why there is no such folder (or file) at ``path``: to be put behind its name in a message."""
    if not path.exists():
        return "does not exist"
    return f"is a {'folder' if path.is_dir() else 'file'}, not a {wanted}"


def nearest(word: str, known: Iterable[str], cutoff: float = 0.6) -> str | None:
    """The known word that ``word`` is most likely a misspelling of, if any is close."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=cutoff)
    return close[0] if close else None
