"""The files of the project, as text."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
HIDDEN_FOLDERS_OF_OURS = {".ci", ".github"}
WRITTEN_FOLDERS = {"build", "data", "dist", "runs"}


def project_files() -> list[Path]:
    """The files under version control; in a copy without that, the files a walk finds."""
    listed = ""
    if git := shutil.which("git"):
        command = [git, "-C", str(ROOT), "ls-files", "-z"]
        listed = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    paths = [ROOT / name for name in listed.split("\0") if name]
    return sorted(path for path in paths or walk() if path.is_file())


def walk() -> Iterator[Path]:
    """Every file outside caches, environments and the folders that mor writes."""
    for folder, subfolders, names in os.walk(ROOT):
        here = Path(folder)
        subfolders[:] = [
            name
            for name in subfolders
            if (not name.startswith(".") or name in HIDDEN_FOLDERS_OF_OURS)
            and not name.endswith(("__pycache__", ".egg-info"))
            and not (here / name / "pyvenv.cfg").exists()
            and not (here == ROOT and name in WRITTEN_FOLDERS)
        ]
        yield from (here / name for name in names)


def text_of(path: Path) -> str | None:
    """The text of a file, or None for a binary one."""
    content = path.read_bytes()
    if b"\0" in content[:8192]:
        return None
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError:
        return None
