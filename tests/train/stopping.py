"""A run that is disturbed at a step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mor.train import Recipe
from mor.train.loop import Loop
from mor.train.state import checkpoints

pytestmark = pytest.mark.slow


def kept(recipe: Recipe) -> list[int]:
    return [
        checkpoints.step_of(p) for p in checkpoints.list_checkpoints(recipe.run_dir / "checkpoints")
    ]


def weights(run: Path) -> bytes:
    return (run / "model" / "model.safetensors").read_bytes()


def fields(**more: Any) -> dict[str, Any]:
    return {"save_steps": 2, "save_total_limit": 2} | more


def once_at(
    step: int, target: Any, name: str, act: Any, monkeypatch: pytest.MonkeyPatch
) -> list[int]:
    """Before the ``name`` of a trainer's ``step`` (done so far), once: do ``act``."""
    done: list[int] = []
    before = getattr(target, name)

    def acting(self: Loop, *args: Any, **kwargs: Any) -> Any:
        if self.step == step and not done:
            done.append(step)
            act()
        return before(self, *args, **kwargs)

    monkeypatch.setattr(target, name, acting)
    return done
