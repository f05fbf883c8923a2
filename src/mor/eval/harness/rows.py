"""Likelihoods by the model's own forward, in batches of rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import track
from torch import Tensor

from mor.hf.modeling import MoRForCausalLM

Ids = list[int]
Row = tuple[int, ...]
Score = tuple[float, bool]


def score_rows(
    model: MoRForCausalLM,
    pairs: Sequence[tuple[Ids, Ids]],
    batch_size: int,
    max_depth: int | None = None,
    quiet: bool = True,
) -> list[Score]:
    """Log-likelihood (nats) of each continuation, and whether it is the greedy one.

    Args:
        model: asked with the causal rule.
        pairs: context and continuation, of at least one token each; all but the last token must
            fit into the model.
        batch_size: rows at a time.
        max_depth: depth cap, 1..R.
        quiet: show no bar.
    """
    asked: dict[Row, list[tuple[int, Ids]]] = {}
    for number, (context, continuation) in enumerate(pairs):
        row = (*context, *continuation)[:-1]
        asked.setdefault(row, []).append((number, continuation))
    rows = sorted(asked, key=lambda row: (-len(row), row))
    scores: dict[int, Score] = {}
    starts = range(0, len(rows), batch_size)
    console = Console(stderr=True)
    for start in track(starts, "log-likelihoods", console=console, disable=quiet):
        batch = rows[start : start + batch_size]
        keep = max(len(ids) for row in batch for _, ids in asked[row])
        found = _logprobs(model, batch, keep, max_depth)
        for tokens, logprobs in zip(batch, found, strict=True):
            for number, continuation in asked[tokens]:
                scores[number] = _score(logprobs, continuation)
    return [scores[number] for number in range(len(pairs))]


@torch.inference_mode()
def _logprobs(
    model: MoRForCausalLM, rows: list[Row], keep: int, max_depth: int | None
) -> Iterator[Tensor]:
    """Log-probabilities [keep, V] after the last ``keep`` tokens of each row."""
    width = max(map(len, rows))
    # Padding on the left: what is asked for is then at the end of every row.
    ids = torch.tensor([[0] * (width - len(row)) + list(row) for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    output = model(
        ids.to(model.device),
        attention_mask=mask.to(model.device),
        use_cache=False,
        routing="causal",
        max_depth=max_depth,
        logits_to_keep=keep,
    )
    for logits in output.logits:
        yield F.log_softmax(logits.float(), dim=-1).cpu()


def _score(logprobs: Tensor, continuation: Ids) -> Score:
    own = logprobs[-len(continuation) :]
    ids = torch.tensor(continuation)
    likelihood = float(own.gather(1, ids[:, None]).double().sum())
    return likelihood, bool((own.argmax(-1) == ids).all())
