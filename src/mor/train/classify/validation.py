"""The score on held-out images or sounds while a run trains."""

from __future__ import annotations

import time
from typing import Any

import torch
import torch.distributed as dist

from mor.data.media import collate_media
from mor.train.distributed import Parallel
from mor.train.objective import run_model
from mor.train.validation import deal_batches, rates


@torch.no_grad()
def validate_examples(
    parallel: Parallel, dataset: Any, batch_size: int, dtype: str = "float32"
) -> dict[str, float]:
    """Loss and accuracy under the rule of inference, and what it took. All ranks call.

    Args:
        parallel: the model; in evaluation mode.
        dataset: of examples; ranks take its batches in turn.
        batch_size: examples at a time.
        dtype: ``bfloat16`` runs the model under autocast.

    Returns:
        ``eval_loss`` in nats per example, ``eval_accuracy`` (of classes), ``eval_mean_depth``,
        ``eval_runtime`` in seconds and two rates.
    """
    began = time.time()
    count, device = len(dataset), parallel.device
    shares = deal_batches(parallel.ranks, count, batch_size)
    # Loss, right answers, recursions and tokens, added up over examples; the others' by all ranks.
    sums = torch.zeros(4, dtype=torch.float64, device=device)
    model: Any = parallel.plain
    classes = model.config.head_type == "classes"
    for places, counts in shares:
        rows = [dataset[one] for one in places]
        batch = {name: tensor.to(device) for name, tensor in collate_media(rows).items()}
        output = run_model(model, dtype, **batch)
        if not counts:
            continue
        labels = batch["labels"]
        right = (output.logits.argmax(-1) == labels).sum() if classes else labels.new_zeros(())
        ran = output.depths
        mask = output.token_mask
        tokens = labels.new_tensor(ran.numel()) if mask is None else mask.sum()
        found = (output.label_loss * len(labels), right, ran.sum(), tokens)
        sums += torch.stack([one.double() for one in found])
    if parallel.ranks > 1:
        dist.all_reduce(sums)
    loss, right, passes, tokens = sums.tolist()
    return {
        "eval_loss": loss / count,
        **({"eval_accuracy": right / count} if classes else {}),
        "eval_mean_depth": passes / max(1.0, tokens),
        **rates(began, count, len(shares)),
    }
