"""Where a number comes from: the commit, the machine, the versions, the command.

Training, evaluation and benchmarks all write the same header with :func:`provenance`, so any record
can be traced. Standard library only: this module lies on the lowest floor, beside
:mod:`mor.errors`.
"""

from __future__ import annotations

import json
import os
import platform
import shlex
import subprocess
import sys
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

DISTRIBUTION = "mixture-of-recursions"
_PACKAGES = (DISTRIBUTION, "torch", "transformers", "tokenizers", "accelerate", "numpy")


def provenance(device: str | None = None) -> dict[str, Any]:
    """Return what a reader needs to repeat a measurement.

    Args:
        device: name of the accelerator that did the work, if any
            (``torch.cuda.get_device_name()``); it is added to the machine's description.

    Returns:
        ``{"commit": str | None, "machine": str, "versions": {package: version}, "command": str}``.
    """
    return {
        "commit": commit(),
        "machine": machine() + (f", {device}" if device else ""),
        "versions": versions(),
        "command": command(),
    }


def commit() -> str | None:
    """Return the commit of the running code, with ``-dirty`` where tracked files were changed.

    None where the code is neither a git checkout nor installed from one.
    """
    package = Path(__file__).resolve().parent
    top = _git(package, "rev-parse", "--show-toplevel")
    # A virtual environment often lies inside another project's checkout: that commit is not ours.
    if top and (Path(top) / "src" / "mor").resolve() == package:
        head = _git(package, "rev-parse", "HEAD")
        dirty = _git(package, "status", "--porcelain", "--untracked-files=no")
        return head and head + ("-dirty" if dirty else "")
    try:
        # PEP 610: pip notes the commit of `pip install git+...` in direct_url.json.
        origin = json.loads(metadata.distribution(DISTRIBUTION).read_text("direct_url.json") or "")
        found: str | None = origin.get("vcs_info", {}).get("commit_id")
        return found
    except (metadata.PackageNotFoundError, ValueError):
        return None


def machine() -> str:
    """Describe the machine: processor, cores this process may use, memory (GiB), system."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    parts = [_processor(), f"{cores} core{'' if cores == 1 else 's'}"]
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        parts.append(f"{total / 2**30:.0f} GiB memory")
    except (AttributeError, ValueError, OSError):
        pass  # Windows does not say; the rest of the line is still worth having.
    parts.append(platform.system())
    return ", ".join(parts)


def versions() -> dict[str, str]:
    """Return the versions of Python and of the installed packages that decide the numbers."""
    found = {package: version_of(package) for package in _PACKAGES}
    known = {package: version for package, version in found.items() if version is not None}
    return {"python": platform.python_version()} | known


@cache
def version_of(package: str) -> str | None:
    """Its installed version, read once; None where it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def command() -> str:
    """Return the command line of this process, quoted for a shell."""
    program = Path(sys.argv[0] or "python")
    if program.name == "__main__.py":
        words = ["python", "-m", program.parent.name]
    elif program.suffix == ".py":
        words = ["python", str(program)]
    else:
        words = [program.name]
    return shlex.join([*words, *sys.argv[1:]])


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=folder, capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
