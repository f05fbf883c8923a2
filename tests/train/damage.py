"""Checkpoints: what they hold, what is kept, and how they are damaged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mor.train import Recipe
from mor.train.state import checkpoints

FILES = (
    "model.safetensors",
    "optimizer.pt",
    "rng_state.pth",
    "trainer_state.json",
    "config.json",
)


def kept(recipe: Recipe) -> Path:
    return recipe.run_dir / "checkpoints"


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-40])


def flip(path: Path) -> None:
    """One bit, the size as it was: only a checksum sees it."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


def read(run: Path) -> bytes:
    return (run / "model" / "model.safetensors").read_bytes()


def spying(do: Any, root: Path, seen: list[list[int]]) -> Any:
    def spied(*args: Any, **kwargs: Any) -> Any:
        for moment in range(2):  # before and after
            if moment:
                result = do(*args, **kwargs)
            whole = [
                checkpoints.step_of(p)
                for p in checkpoints.list_checkpoints(root / "tiny" / "checkpoints")
                if all((p / name).is_file() for name in (*FILES, "manifest.json"))
            ]
            seen.append(whole)
        return result

    return spied
