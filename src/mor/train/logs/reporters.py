"""Reporters beside ``log.jsonl``: Accelerate's trackers, and Transformers' callbacks for the rest.

Accelerate knows TensorBoard, W&B, MLflow, Trackio and others as trackers that are started, given
values and finished. A few services exist only as callbacks of Transformers' Trainer; they are
called here at the same moments as the Trainer would call them.
"""

from __future__ import annotations

import os
from typing import Any, Protocol

import torch
from accelerate import PartialState
from accelerate import tracking as trackers
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import integration_utils as callbacks

from mor.run_files import CHECKPOINTS, TENSORBOARD
from mor.train.recipe.recipe import Recipe
from mor.train.recipe.reporters import choose_reporters

PROJECT = "mor"
# The variable that names the project, and the argument that names the run, where there is one.
_PROJECT_VARIABLES = {
    "wandb": "WANDB_PROJECT",
    "trackio": "TRACKIO_PROJECT",
    "comet_ml": "COMET_PROJECT_NAME",
    "swanlab": "SWANLAB_PROJ_NAME",
}
_RUN_ARGUMENTS = {
    "wandb": "name",
    "trackio": "name",
    "mlflow": "run_name",
    "swanlab": "experiment_name",
    "clearml": "task_name",
}


class Reporter(Protocol):
    """Something that shows the log of a run elsewhere."""

    def start(self) -> None:
        """Called once, when training begins."""

    def log(self, values: dict[str, Any], step: int) -> None:
        """Called with every log entry."""

    def finish(self) -> None:
        """Called once, whatever ended training."""


def open_reporters(recipe: Recipe, steps: int) -> list[Reporter]:
    """The reporters that ``train.report_to`` asks for. Nothing is written yet.

    Raises:
        MorError: one of them is not installed.
    """
    return [
        TrackerReporter(name, recipe)
        if name in trackers.LOGGER_TYPE_TO_CLASS
        else CallbackReporter(name, recipe, steps)
        for name in choose_reporters(recipe.train.report_to)
    ]


class TrackerReporter:
    """One of Accelerate's trackers, or one registered with it.

    Values of an evaluation go under ``eval/``, all others under ``train/``. The project is called
    ``mor`` unless the service's own variable names another (``WANDB_PROJECT`` and the like).
    """

    def __init__(self, name: str, recipe: Recipe) -> None:
        self.name, self.recipe = name, recipe
        self.tracker: Any = None

    def start(self) -> None:
        """Open the service's run."""
        PartialState(cpu=not torch.cuda.is_available())  # trackers ask it which rank this is
        make: Any = trackers.LOGGER_TYPE_TO_CLASS[self.name]
        project = os.environ.get(_PROJECT_VARIABLES.get(self.name, "")) or PROJECT
        arguments: tuple[Any, ...] = ("" if self.name == "tensorboard" else project,)
        if make.requires_logging_directory:
            arguments += (self.recipe.run_dir / TENSORBOARD,)
        named = {_RUN_ARGUMENTS[self.name]: self.recipe.name} if self.name in _RUN_ARGUMENTS else {}
        self.tracker = make(*arguments, **named)
        if hasattr(self.tracker, "start"):  # older releases of Accelerate start as they are made
            self.tracker.start()

    def log(self, values: dict[str, Any], step: int) -> None:
        """Pass on one entry."""
        sorted_by_kind = {
            f"eval/{name[5:]}" if name.startswith("eval_") else f"train/{name}": value
            for name, value in values.items()
        }
        self.tracker.log(sorted_by_kind, step=step)

    def finish(self) -> None:
        """Close the service's run."""
        if self.tracker is not None:
            self.tracker.finish()


class CallbackReporter:
    """A reporting callback of Transformers' Trainer, called without a Trainer."""

    def __init__(self, name: str, recipe: Recipe, steps: int) -> None:
        self.name, self.recipe, self.steps = name, recipe, steps
        self.callback: TrainerCallback | None = None

    def start(self) -> None:
        """Make the callback and tell it that training begins."""
        self.arguments = TrainingArguments(
            output_dir=str(self.recipe.run_dir / CHECKPOINTS),
            run_name=self.recipe.name,
            use_cpu=not torch.cuda.is_available(),
            report_to="none",
            disable_tqdm=True,
        )
        self.state = TrainerState(max_steps=self.steps)
        self.control = TrainerControl()
        callback: TrainerCallback = callbacks.INTEGRATION_TO_CALLBACK[self.name]()
        callback.on_train_begin(self.arguments, self.state, self.control)
        self.callback = callback

    def log(self, values: dict[str, Any], step: int) -> None:
        """Pass on one entry."""
        assert self.callback is not None
        self.state.global_step, self.state.epoch = step, values.get("epoch", 0.0)
        self.callback.on_log(self.arguments, self.state, self.control, logs=values)

    def finish(self) -> None:
        """Tell the callback that training has ended."""
        if self.callback is not None:
            self.callback.on_train_end(self.arguments, self.state, self.control)
