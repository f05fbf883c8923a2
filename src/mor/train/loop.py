"""The training loop, to be read from top to bottom.

    loop = Loop(parallel, objective, section, steps, ...)
    loop.load(checkpoint)
    loop.run()

What is learnt is an objective (:mod:`mor.train.objective`), what moves the weights is in
:mod:`mor.train.step.optimiser`, how ranks work together in :mod:`mor.train.distributed`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mor.model.network import find_router
from mor.ops.ranks import any_rank
from mor.train.distributed import Parallel, all_finite
from mor.train.guards import FiniteGuard, StopSignals
from mor.train.logs.log import RunLog
from mor.train.logs.meter import Meter
from mor.train.objective import Objective, count_targets
from mor.train.recipe.sections import TrainSection
from mor.train.state.content import (
    Progress,
    load_content,
    load_weights,
    read_progress,
    save_content,
)
from mor.train.step.backward import Backward
from mor.train.step.optimiser import Optimiser

Batch = dict[str, Any]


class Loop:
    """One run: micro-batches in, a trained model, a log and checkpoints out.

    Args:
        parallel: the model on this rank's device.
        objective: gives the loss of a micro-batch.
        section: the recipe's ``train`` section.
        steps: optimiser steps of the whole run.
        read: this rank's micro-batches from an optimiser step on, on the CPU.
        meter: measures what the log says about a step.
        log: takes the entries.
        rates: learning rate by group of parameters, in multiples of the main one.
        validate: scores the model; the scores go to the log.
        save: called on all ranks with the step and a function that writes this rank's part of a
            checkpoint into a folder; None where nothing is saved.
        epoch_at: passes over the data after a number of optimiser steps.
        guard: stops the run when a number is not finite.
        depth_caps: on recursions, of every optimiser step; None: no cap.
        backward: runs a micro-batch forward and backward; None: operator after operator.

    Attributes:
        step: optimiser steps done.
        stopped: whether the run ended early because a signal asked for it.
        depth_cap: of the step at hand; None: no cap.
    """

    def __init__(
        self,
        parallel: Parallel,
        objective: Objective,
        section: TrainSection,
        steps: int,
        *,
        read: Callable[[int], Iterable[Batch]],
        meter: Meter,
        log: RunLog,
        rates: Mapping[str, float] | None = None,
        validate: Callable[[], dict[str, float]] | None = None,
        save: Callable[[int, Callable[[Path], None]], None] | None = None,
        epoch_at: Callable[[int], float] | None = None,
        guard: FiniteGuard | None = None,
        depth_caps: np.ndarray | None = None,
        backward: Backward | None = None,
    ) -> None:
        self.parallel, self.objective = parallel, objective
        self.backward = backward or Backward(parallel)
        self.section, self.steps = section, steps
        self.read, self.meter, self.log = read, meter, log
        self.validate, self.save_checkpoint = validate, save
        self.epoch_at = epoch_at or (lambda step: 0.0)
        self.guard = guard or FiniteGuard(section.learning_rate, log.path.parent)
        self.depth_caps = depth_caps
        self.accumulation = section.accumulation(parallel.ranks)
        self.optimiser = Optimiser(parallel.plain, section, steps, rates)
        self.router = find_router(parallel.plain)
        self.signals = StopSignals()
        self.step, self.stopped = 0, False
        self.depth_cap: int | None = None

    def run(self) -> None:
        """Train up to the last step, or until a signal asks to stop."""
        self.log.read(self.step)
        if self.step >= self.steps:
            return
        self.meter.begin(self.log.last("elapsed_s"), self.log.last("cpu_s"))
        with self.log.running(), self.signals.listening(alone=self.parallel.ranks == 1):
            batches = iter(self.read(self.step))
            while self.step < self.steps and not self.stopped:
                self.begin_step()
                self.learn(batches)
                norms = self.clip()
                self.optimiser.step()
                self.router.finish_step()
                self.step += 1
                self.end_step(norms)

    # One step ------------------------------------------------------------------------------------

    def begin_step(self) -> None:
        """Set what depends on the step: learning rate, router's warm-ups, cap on depth."""
        self.parallel.model.train()
        self.optimiser.begin_step(self.step)
        self.router.begin_step(self.step, self.accumulation)
        if self.depth_caps is not None:
            self.depth_cap = int(self.depth_caps[self.step])

    def learn(self, batches: Iterator[Batch]) -> None:
        """Forward and backward of every micro-batch; gradients add up."""
        step_batches = [self._move(next(batches)) for _ in range(self.accumulation)]
        items = self.parallel.sum(count_targets(step_batches)).float()
        for number, batch in enumerate(step_batches, 1):
            self.learn_micro_batch(batch, items, last=number == self.accumulation)
        self.parallel.release()

    def learn_micro_batch(self, batch: Batch, items: Tensor, *, last: bool) -> None:
        """Forward and backward of one micro-batch; ranks exchange gradients after the last."""
        self.meter.start()
        logged = last and self._logs_next
        with self.parallel.accumulating(last=last):
            loss, parts = self.backward(self.objective, batch, items, traces=logged)
        self.meter.add(loss, parts, self.router if logged else None)

    def clip(self) -> dict[str, Tensor]:
        """Clip the gradients, and look at their norms and the loss before the optimiser does.

        Returns:
            The norms from before clipping.

        Raises:
            MorError: a number is not finite; the weights are as they were.
        """
        norms = self.optimiser.clip()
        # A norm is the same on every rank, so that all of them stop. A loss is each rank's own.
        alone = {"loss": self.meter.loss} if self.parallel.ranks == 1 else {}
        self.guard.check(norms | alone, self.step + 1)
        return norms

    def end_step(self, norms: dict[str, Tensor]) -> None:
        """Log, evaluate and save where this step is due."""
        section, step, last = self.section, self.step, self.step >= self.steps
        self.log.advance(step)
        # One rank that was asked to stop is enough: the ranks ask each other after every step.
        self.stopped = not last and any_rank(self.signals.asked, self.parallel.device)
        if last or step % section.logging_steps == 0:
            self.log_step(norms)
        if last or (section.eval_steps and step % section.eval_steps == 0):
            self.evaluate()
        rhythm = section.save_steps and (last or step % section.save_steps == 0)
        if self.stopped or rhythm or section.saves_at(step):
            self.save()

    # Beside the steps ----------------------------------------------------------------------------

    def log_step(self, norms: dict[str, Tensor]) -> None:
        """Write an entry about the steps since the last one.

        Raises:
            MorError: the loss or the gradient is not finite; the last checkpoint is kept.
        """
        entry = self.meter.measure_loss()
        entry |= {"grad_norm": float(norms["gradient norm"]), "learning_rate": self.optimiser.rate}
        self.guard.check(
            {f"training run's {n}": torch.tensor(entry[n]) for n in ("loss", "grad_norm")},
            self.step,
        )
        entry |= self.meter.measure(self.step)
        entry |= {} if self.depth_cap is None else {"depth_cap": self.depth_cap}
        self.log.write(entry | self._position(), self.step)

    def evaluate(self) -> None:
        """Score the validation data; training draws the same random numbers afterwards."""
        if self.validate is None:
            return
        device = self.parallel.device
        drawn_from = [device] if device.type == "cuda" else []
        with self.meter.paused(), torch.random.fork_rng(drawn_from):
            self.parallel.model.eval()
            scores = self.validate()
            self.parallel.release()
            self.log.write(scores | self._position(), self.step)

    def save(self) -> None:
        """Save a checkpoint, unless a weight is not finite: the last good one stays.

        Raises:
            MorError: a weight is not finite, or the checkpoint could not be written.
        """
        if self.save_checkpoint is None:
            return
        with self.meter.paused():
            if not all_finite(self.parallel.plain):
                raise self.guard.error("a weight is not a finite number", self.step)
            self.save_checkpoint(self.step, self._write)
        self.log.flush()

    def _write(self, folder: Path) -> None:
        progress = Progress(self.step, self.steps, self.epoch_at(self.step))
        plain, ranks = self.parallel.plain, self.parallel.ranks
        save_content(folder, plain, self.optimiser, progress, ranks=ranks)

    def load(self, checkpoint: Path) -> None:
        """Go on from a checkpoint; of a finished run's last one only the weights are needed.

        Raises:
            MorError: a file is missing or damaged, or it belongs to another network.
        """
        self.step = read_progress(checkpoint).global_step
        plain, ranks = self.parallel.plain, self.parallel.ranks
        if self.step < self.steps:
            load_content(checkpoint, plain, self.optimiser, ranks=ranks)
        else:
            load_weights(checkpoint, plain)

    @property
    def _logs_next(self) -> bool:
        upcoming = self.step + 1
        return upcoming % self.section.logging_steps == 0 or upcoming >= self.steps

    def _position(self) -> dict[str, float]:
        return self.meter.count(self.step) | {"epoch": self.epoch_at(self.step)}

    def _move(self, batch: Batch) -> Batch:
        device = self.parallel.device
        moved = {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}
        return moved if self.depth_cap is None else moved | {"max_depth": self.depth_cap}
