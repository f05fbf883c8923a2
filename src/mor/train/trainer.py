"""Transformers' Trainer, taught to log what a Mixture-of-Recursions run needs to know."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, Dataset, Sampler, SequentialSampler

from mor.data import ResumableSampler, TrainingSamples
from mor.errors import MorError
from mor.hf.modeling import MoRCausalLMOutput
from mor.model.metrics import batch_metrics
from mor.model.routers.base import Router
from mor.train.callbacks import RouterCallback, find_router
from mor.train.distributed import RanksTrainer, all_finite
from mor.train.plan.budget import training_flops
from mor.train.plan.mfu import FlopsMeter, peak_flops
from mor.train.state.saving import AtomicSaves
from mor.train.workers import Patient


def peak_memory_bytes() -> int | None:
    """Peak memory so far: of the GPU where there is one, else of this process; None if unknown."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _plain(value: Any) -> torch.Tensor:
    """A scalar as a float32 tensor, gathered where it is spread over ranks."""
    whole = value.full_tensor() if hasattr(value, "full_tensor") else value
    return torch.as_tensor(whole).detach().float()


class MoRTrainer(AtomicSaves, RanksTrainer):
    """Trainer with router losses and metrics in the log, and order left to the dataset.

    Its checkpoints are whole or absent, and a step whose gradient is not finite changes nothing.

    Args:
        seq_len: tokens per sequence, for counting tokens and FLOPs.
        auxiliary_router_lr_factor: learning rate of an auxiliary router, in multiples of the main.
        peak_flops: per second and device, for the utilisation in the log; default that of the GPU
            by its name, or of the CPU as measured.
        args, kwargs: as for :class:`transformers.Trainer`.

    Raises:
        MorError: label smoothing, or a loss function of one's own.
    """

    def __init__(
        self,
        *args: Any,
        seq_len: int,
        auxiliary_router_lr_factor: float = 10.0,
        peak_flops: float | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        own = {"label_smoothing_factor": self.args.label_smoothing_factor or None}
        for name, value in (own | {"compute_loss_func": self.compute_loss_func}).items():
            if value is not None:
                raise MorError(
                    f"{name}={value} takes another loss than the model's, whose parts MoRTrainer "
                    "logs; leave it out, or use transformers.Trainer with RouterCallback"
                )
        self.seq_len = seq_len
        self.auxiliary_router_lr_factor = auxiliary_router_lr_factor
        self._tokens_run = 0
        self._began: float | None = None
        self._elapsed_before = self._cpu_before = 0.0
        self._paused = 0.0
        self._parts: dict[str, list[torch.Tensor]] = {}
        self._metrics: dict[str, float] = {}
        self._flops: list[float] = [0.0]
        self.peak_flops = peak_flops
        self._meter: FlopsMeter | None = None
        self._auxiliary_norm: torch.Tensor | None = None
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
            one = training_flops(config, self.seq_len, len(self._flops) - 1) * self.tokens_per_step
            self._flops.append(self._flops[-1] + one)
        return self._flops[step]

    def last_logged(self, key: str) -> float | None:
        """The newest value of ``key`` in the log, sessions before a resume included."""
        entries = reversed(self.state.log_history)
        return next((entry[key] for entry in entries if key in entry), None)

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler | None:
        """In order, from the step the run is at: what lies before is not even listed."""
        dataset = train_dataset or self.train_dataset
        if isinstance(dataset, TrainingSamples):
            # Asked when the first batch is wanted: by then a resumed run's state is loaded.
            per_step = dataset.per_step
            return ResumableSampler(dataset, lambda: self.state.global_step * per_step)
        return SequentialSampler(dataset)  # type: ignore[arg-type]

    def get_train_dataloader(self) -> DataLoader:
        """The Trainer's, with random numbers of its own.

        A loader draws a seed for its workers when iteration begins. Drawn from the global state,
        which a checkpoint has just restored, it would shift all that a resumed run draws.
        """
        loader = super().get_train_dataloader()
        getattr(loader, "base_dataloader", loader).generator = torch.Generator()
        return loader

    def _get_dataloader(self, *args: Any, **kwargs: Any) -> DataLoader:
        """With workers that a signal to the whole job does not end (:mod:`mor.train.workers`)."""
        loader = super()._get_dataloader(*args, **kwargs)
        inner = getattr(loader, "base_dataloader", loader)  # Accelerate wraps it
        if inner.num_workers:
            inner.worker_init_fn = Patient(inner.worker_init_fn)
        return loader

    # Optimiser: an auxiliary router's loss reaches no other parameter, so one optimiser serves
    # both, with a learning rate and a gradient norm of its own, as in the released code.

    def _auxiliary(self) -> list[nn.Parameter]:
        auxiliary = getattr(self._router, "auxiliary", None)
        return [] if auxiliary is None else list(auxiliary.parameters())

    def create_optimizer(self, model: nn.Module | None = None) -> Optimizer:
        """AdamW, decay on all but norms; an auxiliary router gets a learning rate of its own."""
        if self.optimizer is not None:
            return self.optimizer
        optimizer = super().create_optimizer() if model is None else super().create_optimizer(model)
        own = {id(p) for p in self._auxiliary()}
        moved = []
        for group in optimizer.param_groups:
            moved += [p for p in group["params"] if id(p) in own]
            group["params"] = [p for p in group["params"] if id(p) not in own]
        if moved:
            rate = self.args.learning_rate * self.auxiliary_router_lr_factor
            decay = self.args.weight_decay
            optimizer.add_param_group({"params": moved, "lr": rate, "weight_decay": decay})
        return optimizer

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        """Clip an auxiliary router by itself: its gradients must not slow the network's."""
        own = {id(p) for p in self._auxiliary()}
        if not own:
            return super()._clip_grad_norm(model)
        limit = self.args.max_grad_norm
        for which in (True, False):
            chosen = [p for p in model.parameters() if (id(p) in own) == which]
            norm = self.accelerator.clip_grad_norm_(chosen, limit)
            self._auxiliary_norm = norm if which else self._auxiliary_norm
        return norm

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """Look at this step's gradient before the optimiser does: one number read per step.

        Raises:
            MorError: it is not finite, or the loss is not; the weights are as they were.
        """
        norm = super()._get_grad_norm(model, grad_norm)
        if getattr(self.accelerator, "scaler", None) is not None:
            return norm  # float16: a scaler looks for itself, and skips such steps
        # The norm is the same on every rank, so all of them stop. A loss alone is each rank's own.
        looked = {"gradient norm": norm, "auxiliary router's gradient norm": self._auxiliary_norm}
        if self.args.world_size == 1:
            looked["loss"] = self._tr_loss
        known = {name: _plain(value) for name, value in looked.items() if value is not None}
        if not known:
            return norm  # DeepSpeed keeps it to itself
        together = torch.stack([value.to(self.args.device) for value in known.values()])
        if not bool(torch.isfinite(together).all()):
            name = next(name for name, value in known.items() if not math.isfinite(value))
            raise self._diverged(f"the {name} is {float(known[name])}", self.state.global_step + 1)
        return norm

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Take the state from the checkpoint, and rates and coefficients from the arguments.

        They are the same for a resumed run, where this changes nothing; a branch may set others.
        """
        assert self.optimizer is not None
        names = ("initial_lr", "weight_decay", "betas", "eps")
        wanted = [{n: g[n] for n in names if n in g} for g in self.optimizer.param_groups]
        super()._load_optimizer_and_scheduler(checkpoint)
        schedule = self.lr_scheduler
        if checkpoint is None or not isinstance(schedule, LambdaLR):
            return
        groups = zip(wanted, self.optimizer.param_groups, strict=True)
        for number, (given, group) in enumerate(groups):
            if any(group.get(name) != value for name, value in given.items()):
                group.update(given)
                schedule.base_lrs[number] = given["initial_lr"]
                factor = schedule.lr_lambdas[number](schedule.last_epoch)
                group["lr"] = schedule._last_lr[number] = given["initial_lr"] * factor

    # Clock: tokens/s counts data, forward, backward and optimiser, not evaluation and saving.

    @contextmanager
    def _untimed(self) -> Iterator[None]:
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # what is still queued is training
        began = time.monotonic()
        yield
        self._paused += time.monotonic() - began

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Score the evaluation set under the causal rule; training draws the same numbers after."""
        device = self.args.device
        drawn_from = [device] if device.type == "cuda" else []
        with self._untimed(), torch.random.fork_rng(drawn_from):
            return super().evaluate(*args, **kwargs)

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        """Save a checkpoint, unless it holds a number that is none: the last good one stays."""
        with self._untimed():
            assert isinstance(self.model, nn.Module)
            if not all_finite(self.model):
                raise self._diverged("a weight is not a finite number")
            super()._save_checkpoint(*args, **kwargs)

    def _diverged(self, what: str, step: int | None = None) -> MorError:
        return MorError(
            f"{what} at step {step or self.state.global_step}; lower train.learning_rate="
            f"{self.args.learning_rate} in a branch off an earlier checkpoint (--branch-from), or "
            f"warm up longer in a new run; checkpoints in {self.args.output_dir} are untouched"
        )

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Count tokens, and start the clock at the first step."""
        if self._began is None:
            self._began = time.monotonic()
            self._elapsed_before = self.last_logged("elapsed_s") or 0.0
            self._cpu_before = (self.last_logged("cpu_s") or 0.0) - time.process_time()
        loss = super().training_step(*args, **kwargs)
        self._tokens_run += self.tokens_per_step // self.args.gradient_accumulation_steps
        return loss

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """The model's own loss; in training, its parts are kept for the log."""
        inputs = {**inputs, "return_logits": False}  # nobody here looks at them
        if not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        upcoming = self.state.global_step + 1
        logs_next = upcoming % max(1, int(self.args.logging_steps)) == 0
        logs_next = logs_next or upcoming >= self.state.max_steps
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

    def _utilisation(self, step: int, seconds: float) -> dict[str, float]:
        if self._meter is None:
            dtype = torch.bfloat16 if self.args.bf16 else torch.float32
            peak = self.peak_flops or peak_flops(dtype)
            peak = None if peak is None else peak * self.args.world_size
            planned, tokens = self.flops_until, self.tokens_per_step
            self._meter = FlopsMeter(self._router.config, self.seq_len, tokens, planned, peak)
        return self._meter.read(
            step, self._tokens_run // self.tokens_per_step, seconds, self._metrics
        )

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add parts of the loss, router metrics, tokens, FLOPs, speed and memory.

        Raises:
            MorError: the loss or the gradient is not a finite number; the last checkpoint is kept.
        """
        step = self.state.global_step
        if "loss" in logs and self._parts:
            for name in ("loss", "grad_norm"):
                if not math.isfinite(logs.get(name, 0.0)):
                    raise self._diverged(f"the training run's {name} is {logs[name]}")
            # Micro-batches and ranks each hold their share of the step's language-model loss.
            shares = self.args.gradient_accumulation_steps * self.args.world_size
            for name, values in self._parts.items():
                mean = self.accelerator.reduce(torch.stack(values).float().mean(), "mean")
                logs[name] = float(mean) * (shares if name == "lm_loss" else 1)
            logs |= self._metrics
            assert self._began is not None
            elapsed = time.monotonic() - self._began
            logs["elapsed_s"] = self._elapsed_before + elapsed
            logs["cpu_s"] = self._cpu_before + time.process_time()
            logs["tokens_per_s"] = self._tokens_run / max(1e-9, elapsed - self._paused)
            logs |= self._utilisation(step, elapsed - self._paused)
            memory = peak_memory_bytes()
            logs |= {} if memory is None else {"peak_memory_bytes": memory}
            self._parts, self._metrics = {}, {}
        if "loss" in logs or "eval_loss" in logs:
            logs["tokens"] = step * self.tokens_per_step
            logs["flops"] = self.flops_until(step)
        super().log(logs, start_time)
