"""Answers of a task (`mor.data.tasks`) by difficulty: exact match, depth, and what passes mend.

The rule is the causal one, ``router.decide``. Beside it stand the model with its depth capped, and
**routes by chance**: the depths that the router gave to the queries, dealt out among them at random
while all other tokens keep theirs. What the router knows is the difference.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mor.data import PackedDataset
from mor.data.task_marks import Solution
from mor.errors import MorError
from mor.eval.exits import count_changes
from mor.eval.passes import batches
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
        """Exact match and depth, in all and by difficulty.

        ``rank_correlation`` is of difficulty and depth over queries, which R depths shared by many
        queries keep below 1; ``level_rank_correlation`` is over difficulties and their mean depths.
        """
        names = sorted({int(level) for level in self.levels})
        here = {level: self.levels == level for level in names}
        depths = {level: float(self.depths[rows].mean()) for level, rows in here.items()}
        means = np.array(list(depths.values()))
        return {
            "exact_match": float(self.hits.mean()),
            "query_depth": float(self.depths.mean()),
            "mean_depth": self.mean_depth,
            "by_level": {level: float(self.hits[rows].mean()) for level, rows in here.items()},
            "depth_by_level": depths,
            "rank_correlation": rank_correlation(self.levels, self.depths),
            "level_rank_correlation": rank_correlation(np.array(names), means),
        }


def score_answers(
    model: MoRForCausalLM,
    dataset: PackedDataset,
    *,
    max_sequences: int | None = None,
    batch_size: int = 64,
    seed: int = 0,
    caps: list[Answers] | None = None,
) -> dict[str, Any]:
    """Exact match of a task's answers, causal, by difficulty and by pass.

    Args:
        model: any; left in the mode it was in.
        dataset: a split of a prepared task.
        max_sequences: so many, spread over the split; None for all of it.
        batch_size: sequences at a time; chance deals depths out within a batch.
        seed: of the chance.
        caps: answers of the same sequences at most 1..R recursions, where they are known already.

    Returns:
        ``causal`` (see :meth:`Answers.score`), ``depth_cap`` (the same at most 1..R recursions,
        with how many answers the last pass ``fixed`` and ``broke``), and ``random_routes``, None
        where no two queries differ in depth.

    Raises:
        MorError: the data are no task's, or hold no query with its whole document.
    """
    if dataset.index.task is None:
        raise MorError(f"{dataset.index.directory} was prepared from text and has no answers")
    recursions = model.config.num_recursions
    was_training = model.training
    model.eval()
    try:
        caps = caps or [
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


class Collector:
    """Notes the answers of a pass, batch by batch.

    A query counts where its whole document and its answer stand in one row: cut off from its facts,
    or from the word that says how hard it is, it has no answer. Rows as long as one document or
    several lose none; of others the document that a row begins with is left out, since it may have
    begun in the row before.

    Args:
        dataset: a split of a prepared task, in the order of the text.
    """

    def __init__(self, dataset: PackedDataset) -> None:
        assert dataset.index.task is not None
        self.dataset, self.task = dataset, dataset.index.task
        self.levels: list[np.ndarray] = []
        self.hits: list[np.ndarray] = []
        self.depths: list[np.ndarray] = []
        self.total, self.places = 0, 0
        length = dataset.index.document_length()
        self.whole_rows = length is not None and dataset.seq_len % length == 0

    def solve(self, ids: Tensor) -> Solution:
        """What ids [B, T] ask, and which of the queries count."""
        rows = ids.cpu().numpy()
        found = self.task.solve(rows)
        begun = np.zeros(rows.shape, dtype=bool)
        begun[:, 0], begun[:, 1:] = self.whole_rows, rows[:, :-1] == self.dataset.index.eos_token_id
        return replace(found, asked=found.asked & np.logical_or.accumulate(begun, axis=1))

    def look(self, ids: Tensor, output: Any) -> None:
        """Note what the model made of ids [B, T]."""
        found = self.solve(ids)
        asked, likely = found.asked, output.logits.argmax(-1).cpu().numpy()
        self.levels.append(found.levels[asked])
        self.hits.append(likely[asked] == found.answers[asked])
        self.depths.append(output.depths.cpu().numpy()[asked])
        self.total, self.places = self.total + int(output.depths.sum()), self.places + ids.numel()

    def answers(self) -> Answers:
        """All of them.

        Raises:
            MorError: there was no query.
        """
        levels, hits, depths = (
            np.concatenate(parts) if parts else np.zeros(0)
            for parts in (self.levels, self.hits, self.depths)
        )
        if not len(levels):
            raise MorError(
                f"split {self.dataset.split!r} of {self.dataset.index.directory} holds no query "
                "whose document lies whole in a row; "
                f"seq_len={self.dataset.seq_len} must be longer"
            )
        return Answers(levels, hits, depths, self.total / self.places)


@torch.inference_mode()
def collect_answers(
    model: MoRForCausalLM,
    dataset: PackedDataset,
    max_depth: int | None,
    max_sequences: int | None,
    batch_size: int,
    chance: np.random.Generator | None = None,
) -> Answers:
    """Answer every query of the sequences; with ``chance``, at dealt-out depths."""
    found = Collector(dataset)
    count = len(dataset) if max_sequences is None else min(max_sequences, len(dataset))
    for ids in batches(dataset, count, batch_size, model.device):
        output = _run(model, ids, max_depth)
        if chance is not None:
            asked, depths = found.solve(ids).asked, output.depths.cpu()
            mine = depths[asked]
            depths[asked] = mine[torch.from_numpy(chance.permutation(len(mine)))]
            with forced_depths(model.model, depths.to(model.device)):
                output = _run(model, ids, max_depth)
        found.look(ids, output)
    return found.answers()


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
