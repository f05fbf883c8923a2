"""Packages that only the extra `data` installs."""

from __future__ import annotations

from mor.errors import MorError, missing_package


def need_extra(what: str, package: str) -> MorError:
    """The error to raise where a package of the extra `data` is not installed."""
    return missing_package(f"{what} need", package, "data")
