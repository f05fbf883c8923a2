"""Answers of a task (`mor.data.tasks`) by difficulty: exact match, depth, and what passes mend.

The rule is the causal one, ``router.decide``. Beside it stand the model with its depth capped, and
**routes by chance**: the depths that the router gave to the queries, dealt out among them at random
while all other tokens keep theirs. What the router knows is the difference.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mor.data import PackedDataset
from mor.errors import MorError
from mor.eval.exits import count_changes
from mor.hf.modeling import MoRForCausalLM
from mor.model.routers.forced import forced_depths


@dataclass
class Answers:
    """The queries of a split, in order: [N] each.

    Attributes:
        levels: difficulty.
        hits: whether the answer was the most likely token.
        depths: recursions of the query's token.
        mean_depth: of all tokens, queries or not.
    """

    levels: np.ndarray
    hits: np.ndarray
    depths: np.ndarray
    mean_depth: float

    def score(self) -> dict[str, Any]:
        """Exact match and depth, in all and by difficulty."""
        names = sorted({int(level) for level in self.levels})
        here = {level: self.levels == level for level in names}
        return {
            "exact_match": float(self.hits.mean()),
            "query_depth": float(self.depths.mean()),
            "mean_depth": self.mean_depth,
            "by_level": {level: float(self.hits[rows].mean()) for level, rows in here.items()},
            "depth_by_level": {
                level: float(self.depths[rows].mean()) for level, rows in here.items()
            },
            "rank_correlation": rank_correlation(self.levels, self.depths),
        }


def score_answers(
    model: MoRForCausalLM,
    dataset: PackedDataset,
    *,
    max_sequences: int | None = None,
    batch_size: int = 64,
    seed: int = 0,
) -> dict[str, Any]:
    """Exact match of a task's answers, causal, by difficulty and by pass.

    Args:
        model: any; left in the mode it was in.
        dataset: a split of a prepared task.
        max_sequences: None for the whole split.
        batch_size: sequences at a time; chance deals depths out within a batch.
        seed: of the chance.

    Returns:
        ``causal`` (see :meth:`Answers.score`), ``depth_cap`` (the same at most 1..R recursions,
        with how many answers the last pass ``fixed`` and ``broke``), and ``random_routes``, None
        where no two queries differ in depth.

    Raises:
        MorError: the data are no task's, or hold no query.
    """
    if dataset.index.task is None:
        raise MorError(f"{dataset.index.directory} was prepared from text and has no answers")
    recursions = model.config.num_recursions
    was_training = model.training
    model.eval()
    try:
        caps = [
            collect_answers(model, dataset, cap, max_sequences, batch_size)
            for cap in range(1, recursions + 1)
        ]
        causal = caps[-1]
        by_chance = None
        if len(set(causal.depths.tolist())) > 1:
            by_chance = collect_answers(
                model, dataset, None, max_sequences, batch_size, np.random.default_rng(seed)
            ).score()
    finally:
        model.train(was_training)
    rows: list[dict[str, Any]] = []
    for cap, answers in enumerate(caps, 1):
        row = {"max_depth": cap, **answers.score()}
        if cap > 1:
            row |= count_changes(caps[cap - 2].hits, answers.hits)
        rows.append(row)
    return {
        "task": dict(dataset.index.task.settings),
        "queries": len(causal.levels),
        "causal": causal.score(),
        "depth_cap": rows,
        "random_routes": by_chance,
    }


def list_scores(result: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """The rows that a table of :func:`score_answers` has, each with its name."""
    rows = [(f"depth at most {cap['max_depth']}", cap) for cap in result["depth_cap"]]
    chance = result["random_routes"]
    return rows if chance is None else [*rows, ("routes by chance", chance)]


@dataclass
class _Columns:
    levels: list[np.ndarray] = field(default_factory=list)
    hits: list[np.ndarray] = field(default_factory=list)
    depths: list[np.ndarray] = field(default_factory=list)


@torch.inference_mode()
def collect_answers(
    model: MoRForCausalLM,
    dataset: PackedDataset,
    max_depth: int | None,
    max_sequences: int | None,
    batch_size: int,
    chance: np.random.Generator | None = None,
) -> Answers:
    """Answer every query of the first sequences; with ``chance``, at dealt-out depths."""
    task = dataset.index.task
    assert task is not None
    columns, total, places = _Columns(), 0, 0
    count = len(dataset) if max_sequences is None else min(max_sequences, len(dataset))
    for start in range(0, count, batch_size):
        rows = dataset.__getitems__(list(range(start, min(count, start + batch_size))))
        ids = torch.stack([row["input_ids"] for row in rows])
        asked = task.is_query(ids.numpy())
        asked[:, -1] = False  # its answer is in another row
        output = _run(model, ids.to(model.device), max_depth)
        if chance is not None:
            depths = output.depths.cpu()
            mine = depths[asked]
            depths[asked] = mine[torch.from_numpy(chance.permutation(len(mine)))]
            with forced_depths(model.model, depths.to(model.device)):
                output = _run(model, ids.to(model.device), max_depth)
        guesses = output.logits.argmax(-1).cpu()
        columns.levels.append(task.level(ids.numpy())[asked])
        right = guesses[:, :-1] == ids[:, 1:]
        columns.hits.append(right.numpy()[asked[:, :-1]])
        columns.depths.append(output.depths.cpu().numpy()[asked])
        total, places = total + int(output.depths.sum()), places + ids.numel()
    levels, hits, depths = (
        np.concatenate(parts) if parts else np.zeros(0)
        for parts in (columns.levels, columns.hits, columns.depths)
    )
    if not len(levels):
        raise MorError(f"split {dataset.split!r} of {dataset.index.directory} holds no query")
    return Answers(levels, hits, depths, total / places)


def _run(model: MoRForCausalLM, ids: Tensor, max_depth: int | None) -> Any:
    return model(ids, use_cache=False, routing="causal", max_depth=max_depth)


def rank_correlation(first: np.ndarray, second: np.ndarray) -> float | None:
    """Spearman's: Pearson's correlation of the ranks, equal values sharing a rank; None if flat."""
    ranks = [_ranks(values) for values in (first, second)]
    if any(rank.std() == 0 for rank in ranks):
        return None
    return float(np.corrcoef(ranks[0], ranks[1])[0, 1])


def _ranks(values: np.ndarray) -> np.ndarray:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = counts.cumsum()
    return (ends - (counts - 1) / 2)[inverse]
