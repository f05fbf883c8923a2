"""Callbacks: router state per optimiser step, the end of a run, the log, the progress bar."""

from __future__ import annotations

import inspect
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_pt_utils import LabelSmoother

from mor.disk import append_jsonl
from mor.errors import MorError
from mor.model.model import MoRModel
from mor.model.routers.base import Router, active_router
from mor.train.state.checkpoints import flush_entry
from mor.train.state.run_folder import write_whole
from mor.train.state.saving import any_rank


def find_router(model: nn.Module) -> Router:
    """The router in use inside any wrapper (DDP, PEFT, compile)."""
    return active_router(next(m for m in model.modules() if isinstance(m, MoRModel)).router)


class RouterCallback(TrainerCallback):
    """Keeps a router's step and stored constants in time with the optimiser.

    Works with any Transformers Trainer (``callbacks=[RouterCallback()]``). Warm-ups become a
    function of the trainer's step, which resuming restores, and what the router observed over all
    micro-batches and ranks is folded in once per optimiser step. Where the trainer takes the loss
    from logits or hidden states (label smoothing, TRL), the router's terms enter with the backward
    pass, and this says by how much: see :mod:`mor.hf.backbone`.
    """

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Refuse label smoothing that would scale the gradient wrongly.

        Raises:
            MorError: label smoothing with gradient accumulation in a version of Transformers that
                adds up the means of micro-batches.
        """
        smoothing, micro_batches = args.label_smoothing_factor, args.gradient_accumulation_steps
        by_items = "num_items_in_batch" in inspect.signature(LabelSmoother.__call__).parameters
        if smoothing and micro_batches > 1 and not by_items:
            raise MorError(
                f"label_smoothing_factor={smoothing} with gradient_accumulation_steps="
                f"{micro_batches} makes the gradient {micro_batches} times too large before "
                "Transformers 5.15; upgrade it or accumulate 1"
            )

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Tell the router which step this is."""
        router = find_router(kwargs["model"])
        scaler = getattr(kwargs.get("optimizer"), "scaler", None)  # there in float16 training
        router.begin_step(
            state.global_step,
            args.gradient_accumulation_steps,
            loss_scale=1.0 if scaler is None else scaler.get_scale(),
            loss_elsewhere=bool(args.label_smoothing_factor),
        )

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Fold in what the step observed."""
        find_router(kwargs["model"]).finish_step()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Forget what the arguments of this training said."""
        router = find_router(kwargs["model"])
        router.begin_step(router.step, router.micro_batches)


class EndOfRunCallback(TrainerCallback):
    """Saves, logs and scores where a run needs it; on a signal ends with a checkpoint.

    The signals are Ctrl-C, SIGTERM and SIGUSR1 (what batch systems send before time is up). One
    rank that was told is enough: after each step the ranks ask each other, so all stop at the same.

    Args:
        saves_at: whether a checkpoint is wanted after a step, whatever the rhythm.

    Attributes:
        stopped: whether the run ended early because it was asked to.
    """

    def __init__(self, saves_at: Callable[[int], bool] = lambda step: False) -> None:
        self.saves_at = saves_at
        self.asked = False
        self.stopped = False

    @contextmanager
    def listening(self, *, alone: bool) -> Iterator[None]:
        """Take the signals while training runs; a second Ctrl-C interrupts at once.

        Args:
            alone: no other rank trains along. Among several a second signal changes nothing: their
                launcher sends one of its own after the one that the terminal sent.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        names = ("SIGINT", "SIGTERM", "SIGUSR1")
        signals = [getattr(signal, name) for name in names if hasattr(signal, name)]
        before = {number: signal.getsignal(number) for number in signals}

        def ask(number: int, frame: Any) -> None:
            if self.asked:
                if alone and number == signal.SIGINT:
                    raise KeyboardInterrupt
                return
            self.asked = True
            # No print: a signal may come in the middle of one.
            os.write(
                2, b"\nstopping after this step, with a checkpoint; Ctrl-C again to stop now\n"
            )

        for number in signals:
            signal.signal(number, ask)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Set what the Trainer does after this step."""
        if state.global_step >= state.max_steps:
            control.should_log = control.should_evaluate = True
        elif any_rank(self.asked, args.device):
            self.stopped = control.should_save = control.should_training_stop = True
        if self.saves_at(state.global_step):
            control.should_save = True


class JsonLogCallback(TrainerCallback):
    """Appends every log entry to ``log.jsonl``; on resume, drops what lies past the checkpoint."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Keep the lines up to the step that training starts from."""
        if not state.is_world_process_zero or not self.path.exists():
            return
        kept = []
        for line in self.path.read_text(encoding="utf-8").splitlines():
            try:
                if 0 < json.loads(line)["step"] <= state.global_step:
                    kept.append(line + "\n")
            except (ValueError, KeyError, TypeError):
                continue  # a line cut short by a kill
        write_whole(self.path, "".join(kept))

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """A power cut must not take lines of before the checkpoint."""
        if state.is_world_process_zero and self.path.exists():
            flush_entry(self.path)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """One line per log entry; the Trainer's own closing summary is left to summary.json."""
        if state.is_world_process_zero and logs and "train_runtime" not in logs:
            entry = {"step": state.global_step} | logs
            if "eval_loss" in entry:
                entry["eval_nll"] = entry["eval_loss"]
            append_jsonl(self.path, entry)


class ProgressCallback(TrainerCallback):
    """One bar with loss, tokens/s and time left on a terminal; a line every tenth elsewhere."""

    def __init__(self, label: str, console: Console | None = None) -> None:
        self.label = label
        self.console = console or Console(file=sys.stderr, highlight=False)
        self.bar: Progress | None = None
        self.task: Any = None
        self.began = 0.0
        self.first = 0
        self.told = 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the bar."""
        self.began, self.first = time.monotonic(), state.global_step
        if not state.is_world_process_zero or not self.console.is_terminal:
            return
        self.bar = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            TimeRemainingColumn(),
            console=self.console,
        )
        self.task = self.bar.add_task(
            self.label, total=state.max_steps, completed=state.global_step, note=""
        )
        self.bar.start()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Advance."""
        if self.bar is not None:
            self.bar.update(self.task, completed=state.global_step)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Tell the newest loss and speed."""
        if not state.is_world_process_zero or not logs or "lm_loss" not in logs:
            return
        note = f"loss {logs['lm_loss']:.3f} · {logs['tokens_per_s']:,.0f} tokens/s"
        step, last = state.global_step, state.max_steps
        if self.bar is not None:
            self.bar.update(self.task, note=note)
        elif step * 10 // last > self.told * 10 // last:
            self.told = step
            spent = (time.monotonic() - self.began) / max(1, step - self.first)
            left = spent * (last - step)
            self.console.print(f"{self.label}: step {step}/{last} · {note} · {left:.0f} s left")

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Stop the bar."""
        self.close()

    def close(self) -> None:
        """Stop the bar if it runs; safe to call twice."""
        if self.bar is not None:
            self.bar.stop()
            self.bar = None
