"""Transformers' Trainer, taught to log what a Mixture-of-Recursions run needs to know."""

from __future__ import annotations

import math
import resource
import sys
import time
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.utils.data import Dataset, Sampler, SequentialSampler
from transformers import Trainer

from mor.errors import MorError
from mor.hf.modeling import MoRCausalLMOutput
from mor.model.metrics import batch_metrics
from mor.model.router_base import Router
from mor.train.budget import step_flops
from mor.train.callbacks import RouterCallback, find_router


def peak_memory_bytes() -> int:
    """Peak memory so far: of the GPU where there is one, else of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


class MoRTrainer(Trainer):
    """Trainer with router losses and metrics in the log, and order left to the dataset.

    Args:
        seq_len: tokens per sequence, for counting tokens and FLOPs.
        auxiliary_router_lr_factor: learning rate of an auxiliary router, in multiples of the main.
        args, kwargs: as for :class:`transformers.Trainer`.
    """

    def __init__(
        self, *args: Any, seq_len: int, auxiliary_router_lr_factor: float = 10.0, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self.seq_len = seq_len
        self.auxiliary_router_lr_factor = auxiliary_router_lr_factor
        self.train_seconds = 0.0
        self.tokens_run = 0
        self._started = time.monotonic()
        self._parts: dict[str, list[torch.Tensor]] = {}
        self._metrics: dict[str, float] = {}
        self._flops: list[float] = [0.0]
        self.add_callback(RouterCallback())

    @property
    def _router(self) -> Router:
        assert isinstance(self.model, nn.Module)
        return find_router(self.model)

    @property
    def tokens_per_step(self) -> int:
        """Tokens of one optimiser step over all devices and micro-batches."""
        return (
            self.args.per_device_train_batch_size
            * self.args.gradient_accumulation_steps
            * self.args.world_size
            * self.seq_len
        )

    def flops_until(self, step: int) -> float:
        """Planned training FLOPs of the first ``step`` optimiser steps."""
        config = self._router.config
        while len(self._flops) <= step:
            one = step_flops(config, self.seq_len, len(self._flops) - 1) * self.tokens_per_step
            self._flops.append(self._flops[-1] + one)
        return self._flops[step]

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler | None:
        """In order: the dataset itself is shuffled by (seed, epoch), so resuming needs no state."""
        return SequentialSampler(train_dataset or self.train_dataset)  # type: ignore[arg-type]

    def create_optimizer(self, model: nn.Module | None = None) -> Optimizer:
        """AdamW on all but norms; an auxiliary router gets a learning rate of its own.

        Its loss reaches no other parameter, so one optimiser serves both.
        """
        optimizer = super().create_optimizer() if model is None else super().create_optimizer(model)
        auxiliary = getattr(self._router, "auxiliary", None)
        if auxiliary is None or self.auxiliary_router_lr_factor == 1:
            return optimizer
        own = {id(p) for p in auxiliary.parameters()}
        moved = []
        for group in optimizer.param_groups:
            moved += [p for p in group["params"] if id(p) in own]
            group["params"] = [p for p in group["params"] if id(p) not in own]
        rate = self.args.learning_rate * self.auxiliary_router_lr_factor
        optimizer.add_param_group(
            {"params": moved, "lr": rate, "weight_decay": self.args.weight_decay}
        )
        return optimizer

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Time the step: tokens/s counts training alone, not evaluation and saving."""
        began = time.monotonic()
        loss = super().training_step(*args, **kwargs)
        self.train_seconds += time.monotonic() - began
        self.tokens_run += self.tokens_per_step // self.args.gradient_accumulation_steps
        return loss

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """The model's own loss; in training, its parts are kept for the log."""
        if not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        upcoming = self.state.global_step + 1
        logs_next = upcoming % max(1, int(self.args.logging_steps)) == 0
        inputs = {**inputs, "output_router_traces": logs_next}
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        self._note(outputs, logs_next)
        return (loss, outputs) if return_outputs else loss

    def _note(self, outputs: MoRCausalLMOutput, with_metrics: bool) -> None:
        assert outputs.lm_loss is not None
        assert outputs.depths is not None
        terms = {"lm_loss": outputs.lm_loss}
        for name, term in (outputs.router_losses or {}).items():
            terms[f"router/{name}"] = term
        for name, term in terms.items():
            self._parts.setdefault(name, []).append(term.detach())
        if with_metrics:
            found = batch_metrics(self._router, outputs.depths, outputs.traces or ())
            self._metrics = {f"router/{name}": value for name, value in found.items()}

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add parts of the loss, router metrics, tokens, FLOPs, speed and memory.

        Raises:
            MorError: the loss is not a finite number; the last checkpoint is kept.
        """
        step = self.state.global_step
        if "loss" in logs and self._parts:
            if not math.isfinite(logs["loss"]):
                raise MorError(
                    f"the training loss is {logs['loss']} at step {step}; lower "
                    f"train.learning_rate={self.args.learning_rate} or raise the warm-up; "
                    f"checkpoints in {self.args.output_dir} are untouched"
                )
            # A micro-batch's language-model part is already its share of the step's sum.
            per_step = self.args.gradient_accumulation_steps
            for name, values in self._parts.items():
                mean = float(torch.stack(values).mean())
                logs[name] = mean * per_step if name == "lm_loss" else mean
            logs |= self._metrics
            logs["tokens"] = step * self.tokens_per_step
            logs["flops"] = self.flops_until(step)
            logs["elapsed_s"] = time.monotonic() - self._started
            logs["tokens_per_s"] = self.tokens_run / max(1e-9, self.train_seconds)
            logs["peak_memory_bytes"] = peak_memory_bytes()
            self._parts = {}
        elif "eval_loss" in logs:
            logs["tokens"] = step * self.tokens_per_step
            logs["flops"] = self.flops_until(step)
        super().log(logs, start_time)
