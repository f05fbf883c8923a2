"""The floors of the house hold every room, and the documents tell them."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "src" / "mor"


# Floors ------------------------------------------------------------------------------------------


def floors() -> list[list[str]]:
    """The floors of pyproject.toml from the top, each with its rooms."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    (contract,) = [
        contract
        for contract in project["tool"]["importlinter"]["contracts"]
        if contract["type"] == "layers"
    ]
    return [re.split(r" [:|] ", floor) for floor in contract["layers"]]


def test_the_floors_hold_every_room() -> None:
    rooms = {path.stem for path in SOURCE.glob("*.py")} - {"__init__"}
    rooms |= {path.parent.name for path in SOURCE.glob("*/__init__.py")}
    assert {room for floor in floors() for room in floor} == rooms


def test_documents_tell_the_floors_as_they_are() -> None:
    words = " > ".join(", ".join(f"`{room}`" for room in floor) for floor in floors())
    contributing = " ".join((ROOT / "CONTRIBUTING.md").read_text("utf-8").split())
    assert words in re.sub(r" \([^()]*\)", "", contributing)
    page = (ROOT / "docs" / "architecture.md").read_text("utf-8")
    block = page.partition("## The floors")[2].split("```")[1]
    assert [re.split(r" [·|] ", line) for line in block.strip().splitlines()] == floors()
