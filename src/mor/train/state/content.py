"""What is in a checkpoint: weights, optimiser, random states, and how far the run is.

CHECKPOINT/config.json, model.safetensors   the model, as ``save_pretrained`` writes it
CHECKPOINT/optimizer.pt                     AdamW's state, by the order of its parameters
CHECKPOINT/trainer_state.json               optimiser steps done and planned
CHECKPOINT/rng_state.pth                    random states; rng_state_N.pth of each of several ranks

A sharded model writes folders in place of the two large files (:mod:`mor.train.state.sharded`). The
learning rate is a function of the step and is not stored. The names are those of Transformers'
Trainer, which wrote the checkpoints of earlier versions: those are read as well.
"""

from __future__ import annotations

import json
import random
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers.trainer_pt_utils import safe_globals

from mor.errors import MorError
from mor.train.distributed import is_sharded, rank
from mor.train.state import sharded
from mor.train.step.optimiser import Optimiser

STATE = "trainer_state.json"


@dataclass(frozen=True)
class Progress:
    """How far a run is.

    Attributes:
        global_step: optimiser steps done.
        max_steps: optimiser steps that the run was planned for.
        epoch: passes over the data so far.
    """

    global_step: int
    max_steps: int
    epoch: float = 0.0


def read_progress(checkpoint: Path) -> Progress:
    """How far the run of ``checkpoint`` was.

    Raises:
        MorError: the file is missing or damaged.
    """
    path = checkpoint / STATE
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        return Progress(int(raw["global_step"]), int(raw["max_steps"]), float(raw.get("epoch", 0)))
    except (OSError, ValueError, KeyError, TypeError):
        raise MorError(
            f"{path} is missing or damaged; go on from another checkpoint with --resume-from"
        ) from None


def save_content(
    folder: Path, model: Any, optimiser: Optimiser, progress: Progress, *, ranks: int = 1
) -> None:
    """Write this rank's part of a checkpoint. Every rank calls; the first writes what is shared."""
    first = rank() == 0
    if is_sharded(model):
        sharded.save_shards(model, folder)
        sharded.save_optimizer(model, optimiser.adamw, folder)
    elif first:
        model.save_pretrained(folder)
        torch.save(optimiser.adamw.state_dict(), folder / "optimizer.pt")
    if first:
        (folder / STATE).write_text(json.dumps(asdict(progress), indent=2) + "\n", encoding="utf-8")
    name = "rng_state.pth" if ranks == 1 else f"rng_state_{rank()}.pth"
    torch.save(_random_states(ranks), folder / name)


def load_content(
    checkpoint: Path, model: nn.Module, optimiser: Optimiser, *, ranks: int = 1
) -> None:
    """Take weights, optimiser and random states from a checkpoint of any number of ranks.

    Learning rates and AdamW's coefficients stay those of the recipe: for a resumed run they are
    the same, and a branch may set others.

    Raises:
        MorError: a file is missing or damaged, or it belongs to another network.
    """
    load_weights(checkpoint, model)
    given = optimiser.hyperparameters()
    sharded.load_optimizer(model, optimiser.adamw, checkpoint)
    optimiser.restore_hyperparameters(given)
    _load_random_states(checkpoint, ranks)


def load_weights(checkpoint: Path, model: nn.Module) -> None:
    """Weights and buffers alone. Raises as :func:`load_content`."""
    sharded.load_weights(model, checkpoint)


def _random_states(ranks: int) -> dict[str, Any]:
    states: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "cpu": torch.random.get_rng_state(),
    }
    if torch.cuda.is_available():
        cuda = torch.cuda.random
        states["cuda"] = cuda.get_rng_state() if ranks == 1 else cuda.get_rng_state_all()
    return states


def _load_random_states(checkpoint: Path, ranks: int) -> None:
    """This rank's; a rank that was not there takes the first one's, a GPU then keeps its seed."""
    path = checkpoint / ("rng_state.pth" if ranks == 1 else f"rng_state_{rank()}.pth")
    own = path.is_file()
    if not own:
        saved = sorted(checkpoint.glob("rng_state*.pth"))
        if not saved:
            return
        path = saved[0]
    with safe_globals():
        states = torch.load(path, weights_only=True)
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])
    torch.random.set_rng_state(states["cpu"])
    if own and "cuda" in states and torch.cuda.is_available():
        if isinstance(states["cuda"], list):
            torch.cuda.random.set_rng_state_all(states["cuda"])
        else:
            torch.cuda.random.set_rng_state(states["cuda"])
