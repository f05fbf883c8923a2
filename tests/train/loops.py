"""A training loop around any model, without a recipe and a run folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from mor.data import PackedDataset, TrainingSamples
from mor.model.network import find_network
from mor.train.data import load_batches
from mor.train.distributed import Parallel
from mor.train.logs.log import RunLog
from mor.train.logs.meter import Meter
from mor.train.loop import Loop
from mor.train.objective import NextToken
from mor.train.plan.budget import PlannedFlops
from mor.train.recipe.sections import TrainSection
from tests.tiny import SEQ_LEN


def loop_of(model: nn.Module, data: Path, folder: Path, steps: int, **fields: Any) -> Loop:
    """A loop over the training split of ``data``, every step logged, nothing saved.

    Args:
        model: to train.
        data: a prepared folder.
        folder: for the log.
        steps: optimiser steps.
        fields: of the recipe's ``train`` section.
    """
    more = {"decay_fraction": 0.0, "warmup_fraction": 0.0, "logging_steps": 1} | fields
    section = TrainSection.model_validate({"budget": {"steps": steps}} | more)
    size = section.batch_size * section.accumulation()
    stream = TrainingSamples([PackedDataset(data, "train", SEQ_LEN)], per_step=size)
    config = find_network(model).config
    parallel = Parallel(model, torch.device("cpu"))
    flops = PlannedFlops(config, SEQ_LEN, size * SEQ_LEN)
    return Loop(
        parallel,
        NextToken(),
        section,
        steps,
        read=lambda step: load_batches(
            stream.take(steps * size), section.batch_size, first=step * size
        ),
        meter=Meter(config, flops, parallel, accumulation=section.accumulation(), peak=1e9),
        log=RunLog(folder / "log.jsonl", "loop", steps),
    )
