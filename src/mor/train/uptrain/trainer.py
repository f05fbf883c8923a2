"""The Trainer of a run that learns from a teacher, with a learning rate per group."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import TrainingArguments

from mor.config import MoRConfig
from mor.data import DataIndex, TrainingSamples
from mor.hf.modeling import MoRCausalLMOutput
from mor.model.loss import combine_losses, next_token_targets
from mor.ops.cross_entropy import IGNORE
from mor.ops.distillation import linear_distillation
from mor.train.recipe.recipe import Recipe
from mor.train.recipe.uptrain import UptrainSection
from mor.train.trainer import MoRTrainer
from mor.train.uptrain.cache import TaughtStream, TeacherCache, say_progress
from mor.train.uptrain.groups import rate_factors, split_groups
from mor.train.uptrain.layer_states import network, stream_error, streams, who_ran
from mor.train.uptrain.start import check_uptrain, open_teacher, start_model
from mor.train.uptrain.teacher import Lesson, Teacher


class UpTrainer(MoRTrainer):
    """Trainer whose loss is what the recipe's ``uptrain`` section says.

    With a teacher it is ``lm x cross-entropy + logits x KL + hidden x stream error`` and the
    router's own terms; without one, the model's. The log also gets ``kd/logits`` and ``kd/hidden``.

    Args:
        section: from the recipe.
        teacher: asked live, unless ``cache`` is given.
        cache: filled for every sequence of the run.
        args, kwargs: as for :class:`~mor.train.trainer.MoRTrainer`.
    """

    def __init__(
        self,
        *args: Any,
        section: UptrainSection,
        teacher: Teacher | None = None,
        cache: TeacherCache | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.section, self.teacher, self.cache = section, teacher, cache

    def create_optimizer(self, model: nn.Module | None = None) -> Optimizer:
        """The usual groups, split by the recipe's learning rates; frozen weights are in none."""
        made = self.optimizer is None
        optimizer = super().create_optimizer(model)
        if made and self.section.rates:
            assert isinstance(self.model, nn.Module)
            factors = rate_factors(self.model, self.section.rates)
            groups = split_groups(optimizer.param_groups, factors, self.args.learning_rate)
            optimizer.param_groups = groups
        return optimizer

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """In training, with what the teacher says about the batch."""
        if self.teacher is None or not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        inputs = dict(inputs)
        if self.cache is None:
            lesson = self.teacher.ask(inputs)
        else:
            lesson = self.cache.lesson(inputs)
        upcoming = self.state.global_step + 1
        logs_next = upcoming % max(1, int(self.args.logging_steps)) == 0
        logs_next = logs_next or upcoming >= self.state.max_steps
        outputs = self._distilled(model, inputs, lesson, num_items_in_batch, logs_next)
        self._note(outputs, logs_next)
        loss = outputs.loss
        assert loss is not None
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            # As the Trainer does: gradients are averaged over ranks, items are counted over all.
            loss = loss * self.args.world_size
        return (loss, outputs) if return_outputs else loss

    def _distilled(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        lesson: Lesson,
        num_items_in_batch: Tensor | int | None,
        logs_next: bool,
    ) -> MoRCausalLMOutput:
        distill = self.section.distill
        assert distill is not None
        inner, labels = network(model), inputs.pop("labels")
        routed = inner.config.is_routed
        with streams(inner, set(lesson.hidden)) as found:
            outputs = model(
                **inputs,
                use_cache=False,
                logits_to_keep=1,
                output_hidden_states=True,
                output_router_traces=routed or logs_next,
            )
        targets = next_token_targets(labels)
        normed = outputs.hidden_states[-1].flatten(0, 1)
        router, weight = self._router, inner.lm_head.weight
        own = (targets != IGNORE).sum()
        items = own if num_items_in_batch is None else num_items_in_batch
        items = torch.as_tensor(items, device=targets.device).clamp(min=1)
        if lesson.rows is not None:
            weighted, ce, kl = linear_distillation(
                normed,
                weight,
                targets,
                lesson.rows,
                lm=distill.lm,
                kd=distill.logits,
                temperature=distill.temperature,
            )
            self._keep("kd/logits", kl / items)
        else:
            with torch.set_grad_enabled(distill.lm > 0):
                ce = inner.head_loss(outputs.hidden_states[-2], targets)
            weighted = distill.lm * ce
        parts = combine_losses(
            weighted, targets, router, outputs.router_losses or {}, num_items_in_batch
        )
        loss = parts.total
        if found:
            runners = who_ran(outputs.traces) if routed else None
            error = stream_error(inner.config, found, lesson.hidden, runners)
            self._keep("kd/hidden", error * own / items)
            loss = loss + distill.hidden * (own / items) * error
        outputs.loss, outputs.lm_loss = loss, ce.detach() / items
        return outputs

    def _keep(self, name: str, term: Tensor) -> None:
        """Note a term that adds up over micro-batches and ranks; the log takes means."""
        shares = self.args.gradient_accumulation_steps * self.args.world_size
        self._parts.setdefault(name, []).append(term.detach() * shares)


class Uptraining:
    """What a recipe's ``uptrain`` section comes to, everything checked and nothing written yet.

    Args:
        recipe: with an ``uptrain`` section.
        config: of the student.
        index: of the data.
        facts: what the manifests of this run say so far.

    Attributes:
        model: the student as it starts.
        facts: what its manifests say beside.

    Raises:
        MorError: start, teacher, cache, groups or data do not fit.
    """

    def __init__(
        self, recipe: Recipe, config: MoRConfig, index: DataIndex, facts: dict[str, Any]
    ) -> None:
        assert recipe.uptrain is not None
        self.recipe, self.section = recipe, recipe.uptrain
        self.facts = check_uptrain(recipe, index)
        self.made_from = {"data": facts["data"], "seq_len": recipe.data.seq_len} | self.facts
        self.teacher = open_teacher(self.section, config)
        self._cache()
        self.model = start_model(self.section, config, recipe.train.seed)
        rate_factors(self.model, self.section.rates)

    def _cache(self) -> TeacherCache | None:
        distill = self.section.distill
        if self.teacher is None or distill is None or distill.cache is None:
            return None
        return TeacherCache(distill.cache.expanduser(), self.teacher, self.made_from)

    def trainer(
        self, stream: TrainingSamples, arguments: TrainingArguments
    ) -> tuple[Callable[..., UpTrainer], TrainingSamples]:
        """The trainer, and the samples it reads.

        A cache is filled first, by the first process of a node; the others wait.

        Raises:
            MorError: the cache cannot be written.
        """
        cache = None
        if self.teacher is not None:
            self.teacher.model.to(arguments.device)  # type: ignore[arg-type]
            with arguments.main_process_first(local=True, desc="teacher's cache"):
                cache = self._cache()
                if cache is not None:
                    cache.fill(stream, self.recipe.train.batch_size, say_progress)
        if cache is not None:
            stream = TaughtStream(stream, cache)
            arguments.remove_unused_columns = False  # what it adds is no argument of the model
        make = partial(UpTrainer, section=self.section, teacher=self.teacher, cache=cache)
        return make, stream
