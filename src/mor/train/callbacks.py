"""Callbacks: router state per optimiser step, the JSON-lines log, the progress bar."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from mor.model.router_base import Router
from mor.provenance import append_jsonl


def find_router(model: nn.Module) -> Router:
    """The router inside any wrapper (DDP, PEFT, compile)."""
    return next(m for m in model.modules() if isinstance(m, Router))


class RouterCallback(TrainerCallback):
    """Keeps a router's step and stored constants in time with the optimiser.

    Works with any Transformers Trainer (``callbacks=[RouterCallback()]``). Warm-ups become a
    function of the trainer's step, which resuming restores, and what the router observed over all
    micro-batches and ranks is folded in once per optimiser step.
    """

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Tell the router which step this is."""
        find_router(kwargs["model"]).step = state.global_step

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Fold in what the step observed."""
        find_router(kwargs["model"]).finish_step()


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
                if json.loads(line)["step"] <= state.global_step:
                    kept.append(line + "\n")
            except (ValueError, KeyError):
                continue  # a line cut short by a kill
        self.path.write_text("".join(kept) if state.global_step else "", encoding="utf-8")

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
        self.console = console or Console(file=sys.stderr)
        self.bar: Progress | None = None
        self.task: Any = None
        self.note = ""
        self.began = 0.0
        self.first = 0

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

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Remember the newest loss and speed."""
        if logs and "lm_loss" in logs:
            self.note = f"loss {logs['lm_loss']:.3f}"
            if "tokens_per_s" in logs:
                self.note += f" · {logs['tokens_per_s']:,.0f} tokens/s"

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Advance."""
        if not state.is_world_process_zero:
            return
        if self.bar is not None:
            self.bar.update(self.task, completed=state.global_step, note=self.note)
            return
        tenth = max(1, state.max_steps // 10)
        if state.global_step % tenth == 0 or state.global_step == state.max_steps:
            spent = time.monotonic() - self.began
            done = max(1, state.global_step - self.first)
            left = spent / done * (state.max_steps - state.global_step)
            self.console.print(
                f"{self.label}: step {state.global_step}/{state.max_steps} · {self.note} · "
                f"{left:.0f} s left",
                highlight=False,
            )

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
