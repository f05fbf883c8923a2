"""Check that a tag, the package, the citation and the changelog name the same version.

    python tools/check_release.py v0.1.0 [--notes notes.md]

Prints what is wrong and exits with 1. ``--notes`` writes the changelog's section of the version,
which becomes the text of the release.
"""

from __future__ import annotations

import argparse
import re
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def problems(tag: str, root: Path = ROOT) -> list[str]:
    """What keeps ``tag`` from being released, one sentence each; an empty list is right.

    Args:
        tag: such as ``v0.1.0``.
        root: of the repository.
    """
    if not re.fullmatch(r"v\d+\.\d+\.\d+", tag):
        return [f"the tag {tag!r} must look like v0.1.0"]
    version, found = tag.removeprefix("v"), []
    for name, said in versions(root).items():
        if said != version:
            found.append(f"{name} has version {said}, the tag says {version}")
    if not notes(version, root):
        found.append(f"CHANGELOG.md has no section '## [{version}] - YYYY-MM-DD' with text in it")
    return found


def versions(root: Path) -> dict[str, str]:
    """The version that each file names."""
    package = (root / "src" / "mor" / "__init__.py").read_text("utf-8")
    citation = (root / "CITATION.cff").read_text("utf-8")
    project = tomllib.loads((root / "pyproject.toml").read_text("utf-8"))
    return {
        "pyproject.toml": project["project"]["version"],
        "src/mor/__init__.py": "".join(re.findall(r'^__version__ = "(.+)"$', package, re.M)),
        "CITATION.cff": "".join(re.findall(r"^version: (.+)$", citation, re.M)),
    }


def notes(version: str, root: Path = ROOT) -> str:
    """The changelog's section of a version, without its heading; empty where there is none."""
    text = (root / "CHANGELOG.md").read_text("utf-8")
    heading = rf"^## \[{re.escape(version)}\] - \d{{4}}-\d{{2}}-\d{{2}}$"
    section = re.search(rf"{heading}\n(.*?)(?=^## \[|\Z)", text, re.M | re.S)
    return section[1].strip() if section else ""


def main() -> int:
    """Check, and write the notes; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("tag")
    parser.add_argument("--notes", type=Path)
    arguments = parser.parse_args()
    found = problems(arguments.tag)
    for problem in found:
        print(f"release: {problem}", file=sys.stderr)
    if not found and arguments.notes:
        arguments.notes.write_text(notes(arguments.tag.removeprefix("v")) + "\n", "utf-8")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
