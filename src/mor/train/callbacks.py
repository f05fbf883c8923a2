"""The adapter for people who bring their own trainer: Transformers' Trainer, or TRL's.

``mor train`` does not use it; its loop (:mod:`mor.train.loop`) calls the router itself.
"""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from mor.train.network import find_router

__all__ = ["RouterCallback", "find_router"]


class RouterCallback(TrainerCallback):
    """Keeps a router's step and stored constants in time with the optimiser.

    Works with any Transformers Trainer (``callbacks=[RouterCallback()]``). Warm-ups become a
    function of the trainer's step, which resuming restores, and what the router observed over all
    micro-batches and ranks is folded in once per optimiser step.
    """

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Tell the router which step begins."""
        find_router(kwargs["model"]).begin_step(state.global_step, args.gradient_accumulation_steps)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Fold in what the router observed during the step."""
        find_router(kwargs["model"]).finish_step()
