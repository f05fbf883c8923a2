"""What tests of prepared folders share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

SMALL: dict[str, Any] = {"vocab_size": 300, "validation_fraction": 0.25, "shard_tokens": 300}
Writer = Callable[..., Path]


def contents(folder: Path) -> dict[str, bytes]:
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}
