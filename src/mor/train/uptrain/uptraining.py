"""A run's ``uptrain`` section made real: the model it starts from, its objective, its samples."""

from __future__ import annotations

import torch
from torch.utils.data import Dataset

from mor.config import MoRConfig
from mor.data import DataIndex, TrainingSamples
from mor.data.media import MediaIndex
from mor.train.classify.gain import ExampleGain
from mor.train.classify.objective import Labels
from mor.train.distributed import first_process_first
from mor.train.objective import Distilled, NextToken, Objective
from mor.train.recipe.recipe import Recipe
from mor.train.uptrain.cache import TaughtSamples, TeacherCache, say_progress
from mor.train.uptrain.gain import DepthGain
from mor.train.uptrain.groups import rate_factors
from mor.train.uptrain.start import check_uptrain, open_teacher, start_model


class Uptraining:
    """What a recipe's ``uptrain`` section comes to, everything checked and nothing written yet.

    Args:
        recipe: with an ``uptrain`` section.
        config: of the student.
        index: of the data.
        data: digest of the data's tokens, which a teacher's cache belongs to.

    Attributes:
        model: the student as it starts.
        facts: what the manifests of its checkpoints say beside.

    Raises:
        MorError: start, teacher, cache, groups or data do not fit.
    """

    def __init__(
        self, recipe: Recipe, config: MoRConfig, index: DataIndex | MediaIndex, data: str
    ) -> None:
        assert recipe.uptrain is not None
        self.recipe, self.section = recipe, recipe.uptrain
        self.facts = check_uptrain(recipe, index)
        self.made_from = {"data": data, "seq_len": recipe.data.seq_len} | self.facts
        self.teacher = open_teacher(self.section, config)
        self._open_cache()
        self.model = start_model(self.section, config, recipe.train.seed)
        rate_factors(self.model, self.section.rates)

    def _open_cache(self) -> TeacherCache | None:
        distill = self.section.distill
        if self.teacher is None or distill is None or distill.cache is None:
            return None
        return TeacherCache(distill.cache.expanduser(), self.teacher, self.made_from)

    def prepare(
        self, samples: TrainingSamples, device: torch.device
    ) -> tuple[Objective, Dataset[dict[str, torch.Tensor]]]:
        """The objective, and the samples that it learns from.

        A cache is filled first, by the first process of a node; the others wait.

        Raises:
            MorError: the cache cannot be written.
        """
        train, distill = self.recipe.train, self.section.distill
        text = self.recipe.data.kind in ("text", "captions")
        if self.section.gain is not None:
            return (DepthGain if text else ExampleGain)(self.section.gain), samples
        if self.teacher is None or distill is None:
            return (NextToken if text else Labels)(train.dtype, train.routing), samples
        self.teacher.model.to(device)
        with first_process_first(of_node=True):
            cache = self._open_cache()
            if cache is not None:
                cache.fill(samples, train.batch_size, say_progress)
        objective = Distilled(distill, self.teacher, cache, train.dtype)
        return objective, samples if cache is None else TaughtSamples(samples, cache)
