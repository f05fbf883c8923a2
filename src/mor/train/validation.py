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
    shares = deal_batches(parallel.ranks, count, batch_size)
    found = torch.zeros(len(shares), 2, dtype=torch.float64, device=parallel.device)
    for number, (places, _) in enumerate(shares):
        rows = dataset.__getitems__(places)
        batch = {n: t.to(parallel.device) for n, t in default_data_collator(rows).items()}
        targets = count_targets([batch]).float()
        output = run_model(
            parallel.plain, dtype, **batch, return_logits=False, num_items_in_batch=targets
        )
        assert output.loss is not None
        found[number, 0], found[number, 1] = output.loss, targets
    # Batches hold unequal numbers of targets where only answers count, or rows are padded.
    losses, targets = _gather(found, parallel)[: math.ceil(count / batch_size)].unbind(1)
    loss = float((losses * targets).sum() / targets.sum().clamp(min=1))
    return {"eval_loss": loss} | rates(began, count, len(shares))


def deal_batches(ranks: int, count: int, batch_size: int) -> list[tuple[range, bool]]:
    """The batches of this rank, as many as every other has.

    Args:
        ranks: how many take turns.
        count: examples in all.
        batch_size: examples at a time.

    Returns:
        Of each batch the examples, and whether it counts. Ranks have to run as many passes: one
        that would be left without a batch repeats the first one, which then does not count.
    """
    starts = range(0, count, batch_size)
    shares = []
    for first in range(0, len(starts), ranks):
        place = first + rank()
        start = starts[place] if place < len(starts) else 0
        shares.append((range(start, min(start + batch_size, count)), place < len(starts)))
    return shares


def rates(began: float, count: int, rounds: int) -> dict[str, float]:
    """What ``count`` examples in ``rounds`` passes took since ``began``, in seconds, and rates."""
    seconds = time.time() - began
    return {
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
