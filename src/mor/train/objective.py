"""What a run learns: an objective takes a model and a micro-batch and gives the loss and its parts.

An objective is an object that is called, so a new one needs no subclass of anything:

    class MyObjective:
        def __call__(self, model, batch, items, traces=False) -> LossParts: ...

Every loss is divided by ``items``, the targets of the whole optimiser step over all micro-batches
and ranks, so that the losses of the micro-batches add up to the loss of the step. A label of -100
is no target.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from mor.config.choices import Routing
from mor.hf.outputs import MoRCausalLMOutput, MoRMediaOutput
from mor.model.loss import combine_losses, next_token_targets
from mor.model.network import find_network, find_router
from mor.model.recorder import DepthTrace
from mor.ops.cross_entropy import IGNORE
from mor.ops.distillation import linear_distillation
from mor.train.recipe.uptrain import DistillSection
from mor.train.uptrain.cache import TeacherCache
from mor.train.uptrain.layer_states import find_runners, record_layer_states, stream_error
from mor.train.uptrain.teacher import Lesson, Teacher


@dataclass
class LossParts:
    """The loss of one micro-batch, and what the log says about it.

    Attributes:
        total: scalar to back-propagate, this micro-batch's share of the step's loss.
        shares: scalars of which every micro-batch holds its share, by their names in the log.
        means: scalars that are means over the micro-batch, by their names in the log.
        depths: [B, T] recursions that each token ran.
        traces: selections of each depth, where they were asked for.
        token_mask: [B, T] which tokens are real; None where all are.
    """

    total: Tensor
    shares: dict[str, Tensor] = field(default_factory=dict)
    means: dict[str, Tensor] = field(default_factory=dict)
    depths: Tensor | None = None
    traces: tuple[DepthTrace, ...] = ()
    token_mask: Tensor | None = None


class Objective(Protocol):
    """Anything that can be trained for."""

    def __call__(
        self, model: nn.Module, batch: dict[str, Any], items: Tensor, traces: bool = False
    ) -> LossParts:
        """The loss of one micro-batch.

        Args:
            model: to call; DDP and the like around it.
            batch: ``input_ids`` and ``labels`` [B, T] and whatever else the data holds.
            items: scalar, targets of the whole optimiser step.
            traces: whether the log wants the selections of each depth.
        """


def count_targets(batches: list[dict[str, Any]]) -> Tensor:
    """Targets in some micro-batches, a scalar: labels after the first place, but for -100.

    Labels [B] are classes: each is a target.
    """
    found = (batch["labels"] for batch in batches)
    told = (labels if labels.dim() == 1 else labels[..., 1:] for labels in found)
    return torch.stack([labels.ne(IGNORE).sum() for labels in told]).sum()


@dataclass
class NextToken:
    """The model's own loss: next-token cross-entropy and the router's weighted terms.

    Attributes:
        dtype: ``bfloat16`` runs the model under autocast.
        routing: the rule that chooses depth; None for training's own selection.
    """

    dtype: str = "float32"
    routing: Routing | None = None

    def __call__(
        self, model: nn.Module, batch: dict[str, Any], items: Tensor, traces: bool = False
    ) -> LossParts:
        """See :class:`Objective`."""
        output = run_model(
            model,
            self.dtype,
            **batch,
            routing=self.routing,
            return_logits=False,  # nobody looks at them
            output_router_traces=traces,
            num_items_in_batch=items,
        )
        assert output.loss is not None
        assert output.lm_loss is not None
        return LossParts(
            output.loss,
            {"lm_loss": output.lm_loss},
            router_means(output),
            output.depths,
            output.traces or (),
            batch.get("attention_mask"),
        )


@dataclass
class Distilled:
    """What the recipe's ``uptrain.distill`` says: learning from a teacher.

    ``lm x cross-entropy + logits x KL(teacher || student) + hidden x error of the residual stream``
    and the router's own terms. The log also gets ``kd/logits`` and ``kd/hidden``.

    Attributes:
        section: the weights of the terms, and the temperature.
        teacher: asked about every batch, unless there is a cache.
        cache: holds what the teacher says about every sequence of the run.
        dtype: ``bfloat16`` runs the student under autocast; the teacher stays in float32.
    """

    section: DistillSection
    teacher: Teacher
    cache: TeacherCache | None = None
    dtype: str = "float32"

    def __call__(
        self, model: nn.Module, batch: dict[str, Any], items: Tensor, traces: bool = False
    ) -> LossParts:
        """See :class:`Objective`."""
        batch = dict(batch)
        if self.cache is None:
            lesson = self.teacher.ask(batch)
        else:
            lesson = self.cache.take_lesson(batch)
        targets = next_token_targets(batch.pop("labels"))
        inner, router = find_network(model), find_router(model)
        routed = inner.config.is_routed
        with record_layer_states(inner, set(lesson.hidden)) as found:
            output = run_model(
                model,
                self.dtype,
                **batch,
                use_cache=False,
                logits_to_keep=1,
                output_hidden_states=True,
                output_router_traces=routed or traces,
            )
        own = (targets != IGNORE).sum()
        items = items.clamp(min=1)
        shares: dict[str, Tensor] = {}
        weighted, ce = self._head_losses(inner, output, targets, lesson, items, shares)
        terms = output.router_losses or {}
        total = combine_losses(weighted, targets, router, terms, items).total
        if found:
            runners = find_runners(output.traces or ()) if routed else None
            error = stream_error(inner.config, found, lesson.hidden, runners)
            shares["kd/hidden"] = error * own / items
            total = total + self.section.hidden * (own / items) * error
        shares["lm_loss"] = ce.detach() / items
        means, mask = router_means(output), batch.get("attention_mask")
        return LossParts(total, shares, means, output.depths, output.traces or (), mask)

    def _head_losses(
        self,
        inner: Any,
        output: MoRCausalLMOutput,
        targets: Tensor,
        lesson: Lesson,
        items: Tensor,
        shares: dict[str, Tensor],
    ) -> tuple[Tensor, Tensor]:
        """The weighted losses at the head, and the cross-entropy, each added up over [B T]."""
        states = output.hidden_states
        assert states is not None
        section = self.section
        if lesson.rows is None:
            with torch.set_grad_enabled(section.lm > 0):
                ce = inner.head_loss(states[-2].float(), targets)
            return section.lm * ce, ce
        weighted, ce, kl = linear_distillation(
            states[-1].float().flatten(0, 1),
            inner.lm_head.weight,
            targets,
            lesson.rows,
            lm=section.lm,
            kd=section.logits,
            temperature=section.temperature,
        )
        shares["kd/logits"] = kl / items
        return weighted, ce


def run_model(model: nn.Module, dtype: str, **inputs: Any) -> Any:
    """Call the model, under autocast where ``dtype`` is bfloat16; weights stay float32."""
    given = next(one for one in inputs.values() if isinstance(one, Tensor))
    with torch.autocast(given.device.type, torch.bfloat16, enabled=dtype == "bfloat16"):
        return model(**inputs)


def router_means(output: MoRCausalLMOutput | MoRMediaOutput) -> dict[str, Tensor]:
    """The router's terms of a forward, by the names of the log."""
    return {f"router/{name}": term for name, term in (output.router_losses or {}).items()}
