"""The score on validation data while a run trains."""

from __future__ import annotations

import math
import time
from typing import Any

import torch
import torch.distributed as dist
from transformers import default_data_collator

from mor.train.distributed import Parallel, rank
from mor.train.objective import count_targets, run_model


@torch.no_grad()
def validate(
    parallel: Parallel, dataset: Any, batch_size: int, dtype: str = "float32"
) -> dict[str, float]:
    """Loss under the causal rule, a mean over targets, and what it cost. All ranks call.

    Args:
        parallel: the model; in evaluation mode.
        dataset: of sequences; ranks take its batches in turn.
        batch_size: sequences at a time.
        dtype: ``bfloat16`` runs the model under autocast.

    Returns:
        ``eval_loss`` in nats per token, ``eval_runtime`` in seconds, and two rates.
    """
    began = time.time()
    count = len(dataset)
    starts = range(0, count, batch_size)
    rounds = math.ceil(len(starts) / parallel.ranks)
    found = torch.zeros(rounds, 2, dtype=torch.float64, device=parallel.device)
    for number in range(rounds):
        # Ranks have to run as many passes; one that is left over repeats the first batch.
        place = number * parallel.ranks + rank()
        start = starts[place] if place < len(starts) else 0
        rows = dataset.__getitems__(range(start, min(start + batch_size, count)))
        batch = {n: t.to(parallel.device) for n, t in default_data_collator(rows).items()}
        targets = count_targets([batch]).float()
        output = run_model(
            parallel.plain, dtype, **batch, return_logits=False, num_items_in_batch=targets
        )
        assert output.loss is not None
        found[number, 0], found[number, 1] = output.loss, targets
    # Batches hold unequal numbers of targets where only answers count, or rows are padded.
    losses, targets = _gather(found, parallel)[: len(starts)].unbind(1)
    seconds = time.time() - began
    return {
        "eval_loss": float((losses * targets).sum() / targets.sum().clamp(min=1)),
        "eval_runtime": round(seconds, 4),
        "eval_samples_per_second": round(count / seconds, 3),
        "eval_steps_per_second": round(rounds / seconds, 3),
    }


def _gather(losses: torch.Tensor, parallel: Parallel) -> torch.Tensor:
    """Losses and targets [rounds, 2] of every rank, in the order of the batches."""
    if parallel.ranks == 1:
        return losses
    parts = [torch.empty_like(losses) for _ in range(parallel.ranks)]
    dist.all_gather(parts, losses)
    return torch.stack(parts, dim=1).flatten(0, 1)
