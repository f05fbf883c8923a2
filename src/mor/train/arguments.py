"""From a recipe to Transformers' training arguments: AdamW, trapezoid, reporters."""

from __future__ import annotations

import os
from typing import Any

import torch
from transformers import TrainingArguments

from mor.errors import MorError
from mor.train.distributed import world_size
from mor.train.plan.budget import Plan
from mor.train.recipe.recipe import Recipe
from mor.train.recipe.reporters import reporters
from mor.train.recipe.sections import TrainSection
from mor.train.state.run_folder import CHECKPOINTS, TENSORBOARD


def trapezoid(section: TrainSection, steps: int) -> tuple[int, int]:
    """Steps of warm-up and of decay; they never overlap."""
    warmup = round(section.warmup_fraction * steps)
    if section.warmup_steps is not None:
        warmup = min(section.warmup_steps, steps)
    return warmup, min(round(section.decay_fraction * steps), steps - warmup)


def training_arguments(
    recipe: Recipe, plan: Plan, *, find_unused: bool = False
) -> TrainingArguments:
    """Transformers' arguments for this recipe. Nothing is written yet.

    ``find_unused`` tells DDP to look for parameters without a gradient, at some cost.

    Raises:
        MorError: a reporter is asked for and not installed, or bfloat16 is not to be had.
    """
    section = recipe.train
    report_to = reporters(section.report_to)
    if "tensorboard" in report_to:
        os.environ["TENSORBOARD_LOGGING_DIR"] = str(recipe.run_dir / TENSORBOARD)
    gpu = torch.cuda.is_available()
    if gpu and section.dtype == "bfloat16" and not torch.cuda.is_bf16_supported():
        raise MorError("train.dtype=bfloat16 is not supported by this GPU; use float32")
    extra: dict[str, Any] = {} if gpu else {"use_cpu": True}
    warmup, decay = trapezoid(section, plan.steps)
    arguments = TrainingArguments(
        output_dir=str(recipe.run_dir / CHECKPOINTS),
        run_name=recipe.name,
        max_steps=plan.steps,
        per_device_train_batch_size=section.batch_size,
        per_device_eval_batch_size=section.batch_size,
        gradient_accumulation_steps=section.accumulation(world_size()),
        learning_rate=section.learning_rate,
        adam_beta1=section.adam_beta1,
        adam_beta2=section.adam_beta2,
        adam_epsilon=section.adam_epsilon,
        weight_decay=section.weight_decay,
        max_grad_norm=section.max_grad_norm,
        lr_scheduler_type="warmup_stable_decay",
        lr_scheduler_kwargs={"num_decay_steps": decay, "decay_type": "linear"},
        warmup_steps=warmup,
        bf16=section.dtype == "bfloat16",
        seed=section.seed,
        logging_steps=section.logging_steps,
        logging_nan_inf_filter=False,
        eval_strategy="steps" if section.eval_steps else "no",
        eval_steps=section.eval_steps,
        save_strategy="steps" if section.save_steps else "no",
        save_steps=section.save_steps or 500,
        save_total_limit=section.save_total_limit,
        prediction_loss_only=True,
        dataloader_num_workers=section.num_workers,
        ignore_data_skip=True,  # the sampler begins at the right sample by itself
        dataloader_pin_memory=gpu,
        ddp_find_unused_parameters=find_unused,
        report_to=report_to or "none",
        disable_tqdm=True,
        **extra,
    )
    # One process, one device: more GPUs are used through torchrun, never through DataParallel.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments
