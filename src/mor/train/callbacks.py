"""The adapter for people who bring their own trainer: Transformers' Trainer, or TRL's.

``mor train`` does not use it; its loop (:mod:`mor.train.loop`) calls the router itself.
"""

from __future__ import annotations

import inspect
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_pt_utils import LabelSmoother

from mor.errors import MorError
from mor.model.network import find_router

__all__ = ["RouterCallback", "find_router"]


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
        """Tell the router which step begins."""
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
        """Fold in what the router observed during the step."""
        find_router(kwargs["model"]).finish_step()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Forget what the arguments of this training said."""
        router = find_router(kwargs["model"])
        router.begin_step(router.step, router.micro_batches)
