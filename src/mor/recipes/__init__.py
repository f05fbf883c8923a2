"""The recipes that come with mor, by name: ``demo/threshold`` is ``demo/threshold.yaml`` here."""

from __future__ import annotations

from pathlib import Path

FOLDER = Path(__file__).resolve().parent


def builtin_recipes() -> list[str]:
    """Names of the recipes that come with mor."""
    found = FOLDER.rglob("*.yaml")
    return sorted(path.relative_to(FOLDER).with_suffix("").as_posix() for path in found)
