"""What a study will cost, before it runs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mor.model.flops import count_parameters
from mor.study.file import Job, Study, expand, more_seeds, points
from mor.train import plan_budget
from mor.train.classify.data import resolve_media
from mor.train.plan.data import plan_data
from mor.train.plan.depth import depth_schedule_of
from mor.train.run import with_branches


@dataclass(frozen=True)
class Cost:
    """Of one training run with its branches.

    Attributes:
        name: of the run. row: of the table. runs: how many, branches included.
        parameters: without the embedding.
        tokens, flops: trained, of all its runs; a branch counts its own part only.
    """

    name: str
    row: str
    runs: int
    parameters: int
    tokens: int
    flops: float


def plan_study(study: Study, out: Path, scale: float = 1.0) -> list[Cost]:
    """The cost of every training; other seeds are planned at the first point of a grid.

    Raises:
        MorError: a row's recipe is wrong, or its data is damaged.
    """
    jobs = expand(study, out, scale)
    for row, part in study.rows.items():
        jobs += more_seeds(study, row, next(points(part)), out, scale)
    return [_cost(job) for job in jobs]


def missing_data(study: Study, out: Path) -> str:
    """What a plan assumes of data that is not there; empty where all is."""
    notes = [plan_data(job.recipe).note for job in expand(study, out)]
    return "; ".join(dict.fromkeys(note for note in notes if note))


def _cost(job: Job) -> Cost:
    # Before the data is there, with an assumed vocabulary.
    config = plan_data(job.recipe).config
    recipe = resolve_media(job.recipe)
    per_step = recipe.sequences_per_step() * recipe.data.seq_len
    tokens, flops, parts = 0, 0.0, with_branches(recipe, config)
    for part in parts:
        schedule = depth_schedule_of(part.train, config.num_recursions)
        plan = plan_budget(part.train.budget, config, recipe.data.seq_len, per_step, schedule)
        share = 1.0
        if part.train.branch_from is not None:  # what comes before was trained by the trunk
            start = int(part.train.branch_from.name.rpartition("-")[2])
            share = (plan.steps - start) / plan.steps
        tokens, flops = tokens + round(plan.tokens * share), flops + plan.flops * share
    _, inner = count_parameters(config)
    return Cost(job.name, job.row, len(parts), inner, tokens, flops)
