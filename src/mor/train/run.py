"""One run from recipe to folder: data, model, trainer, final checkpoint, summary."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import torch
import yaml
from torch.utils.data import Dataset, Subset
from transformers import AutoTokenizer, PrinterCallback, TrainingArguments, set_seed
from transformers.trainer_utils import get_last_checkpoint
from transformers.utils.logging import disable_progress_bar

from mor.data import PackedDataset
from mor.errors import MorError
from mor.hf.modeling import MoRForCausalLM
from mor.model.flops import count_parameters
from mor.provenance import provenance
from mor.train.budget import Plan, plan_budget
from mor.train.callbacks import JsonLogCallback, ProgressCallback
from mor.train.recipe import Recipe
from mor.train.trainer import MoRTrainer, peak_memory_bytes


def train(recipe: Recipe, *, resume: bool = False, overwrite: bool = False) -> Path:
    """Train what ``recipe`` says and leave a run folder.

    The folder ``recipe.run_dir`` holds ``model/`` (for ``from_pretrained``, tokenizer included),
    ``recipe.yaml``, ``log.jsonl``, ``summary.json`` and ``checkpoints/``.

    Args:
        recipe: validated.
        resume: continue from the newest checkpoint of the run folder.
        overwrite: replace a run folder that is already there.

    Returns:
        The run folder.

    Raises:
        MorError: the data folder is wrong, the run exists already, nothing to resume from.
    """
    if recipe.train.threads:
        torch.set_num_threads(recipe.train.threads)
    disable_progress_bar()  # one bar is enough: ours
    data, section = recipe.data, recipe.train
    train_set = PackedDataset(
        data.path, data.train_split, data.seq_len, order_seed=recipe.train.seed
    )
    validation: Dataset = PackedDataset(data.path, data.validation_split, data.seq_len)
    count = min(section.eval_sequences, len(validation))  # type: ignore[arg-type]
    validation = Subset(validation, range(count))
    config = recipe.model_config_for(train_set.index.vocab_size, train_set.index.eos_token_id)
    per_step = section.batch_size * section.gradient_accumulation_steps * data.seq_len
    per_step *= int(os.environ.get("WORLD_SIZE", "1"))
    plan = plan_budget(section.budget, config, data.seq_len, per_step)
    checkpoint = _claim(recipe.run_dir, resume, overwrite)
    set_seed(section.seed)
    model = MoRForCausalLM(config)
    if section.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    began = time.monotonic()
    progress = ProgressCallback(recipe.name)
    trainer = MoRTrainer(
        model=model,
        args=training_arguments(recipe, plan),
        train_dataset=train_set,
        eval_dataset=validation,
        seq_len=data.seq_len,
        auxiliary_router_lr_factor=section.auxiliary_router_lr_factor,
        callbacks=[JsonLogCallback(recipe.run_dir / "log.jsonl"), progress],
    )
    trainer.remove_callback(PrinterCallback)
    _write(recipe.run_dir / "recipe.yaml", yaml.safe_dump(json.loads(recipe.model_dump_json())))
    try:
        trainer.train(resume_from_checkpoint=checkpoint)
    finally:
        progress.close()
    if trainer.is_world_process_zero():
        _save_model(trainer, train_set.index.directory / "tokenizer", recipe.run_dir / "model")
        record = summary(recipe, plan, trainer, time.monotonic() - began)
        _write(recipe.run_dir / "summary.json", json.dumps(record, indent=2) + "\n")
    return recipe.run_dir


def _claim(run_dir: Path, resume: bool, overwrite: bool) -> str | None:
    """Make the run folder ours; the checkpoint to resume from, if asked for."""
    checkpoints = run_dir / "checkpoints"
    if resume:
        found = get_last_checkpoint(str(checkpoints)) if checkpoints.is_dir() else None
        if found is None:
            raise MorError(
                f"{checkpoints} holds no checkpoint to resume from; start without --resume "
                "(and set train.save_steps to keep checkpoints)"
            )
        return found
    if run_dir.exists() and any(run_dir.iterdir()):
        if not overwrite:
            raise MorError(
                f"{run_dir} already holds a run; use --resume, --overwrite or another name"
            )
        shutil.rmtree(run_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    return None


def training_arguments(recipe: Recipe, plan: Plan) -> TrainingArguments:
    """Transformers' arguments for this recipe: AdamW, trapezoid, no shuffling but the dataset's."""
    section = recipe.train
    report_to = section.report_to
    if report_to is None:
        report_to = ["tensorboard"] if importlib.util.find_spec("tensorboard") else []
    if "tensorboard" in report_to:
        if not importlib.util.find_spec("tensorboard"):
            raise MorError(
                "train.report_to names tensorboard, which is not installed: "
                "pip install 'mixture-of-recursions[tensorboard]' or set train.report_to=[]"
            )
        os.environ["TENSORBOARD_LOGGING_DIR"] = str(recipe.run_dir / "tensorboard")
    extra: dict[str, Any] = {}
    if not torch.cuda.is_available():
        extra["use_cpu"] = True
    return TrainingArguments(
        output_dir=str(recipe.run_dir / "checkpoints"),
        run_name=recipe.name,
        max_steps=plan.steps,
        per_device_train_batch_size=section.batch_size,
        per_device_eval_batch_size=section.batch_size,
        gradient_accumulation_steps=section.gradient_accumulation_steps,
        learning_rate=section.learning_rate,
        adam_beta1=section.adam_beta1,
        adam_beta2=section.adam_beta2,
        adam_epsilon=section.adam_epsilon,
        weight_decay=section.weight_decay,
        max_grad_norm=section.max_grad_norm,
        lr_scheduler_type="warmup_stable_decay",
        lr_scheduler_kwargs={
            "num_decay_steps": round(section.decay_fraction * plan.steps),
            "decay_type": "linear",
        },
        warmup_steps=round(section.warmup_fraction * plan.steps),
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
        dataloader_drop_last=True,
        report_to=report_to or "none",
        disable_tqdm=True,
        **extra,
    )


def summary(recipe: Recipe, plan: Plan, trainer: MoRTrainer, wall_s: float) -> dict[str, Any]:
    """What was trained, at what cost, by which code on which machine."""
    model = trainer.model
    assert isinstance(model, MoRForCausalLM)
    config = model.config
    parameters, non_embedding = count_parameters(config)
    steps = trainer.state.global_step
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "name": recipe.name,
        "family": config.family,
        "router": config.router,
        "num_recursions": config.num_recursions,
        "capacities": config.router_capacities,
        "parameters": parameters,
        "non_embedding_parameters": non_embedding,
        "tokens": steps * plan.tokens_per_step,
        "steps": steps,
        "train_flops": trainer.flops_until(steps),
        "wall_s": round(wall_s, 3),
        "tokens_per_s": trainer.tokens_run / max(1e-9, trainer.train_seconds),
        "peak_memory_bytes": peak_memory_bytes(),
        "seed": recipe.train.seed,
        "seq_len": recipe.data.seq_len,
        "dtype": recipe.train.dtype,
        "threads": torch.get_num_threads(),
    } | provenance(device)


def _save_model(trainer: MoRTrainer, tokenizer_dir: Path, out: Path) -> None:
    """Write ``model/`` beside, then move it into place."""
    fresh = out.with_name(out.name + ".partial")
    shutil.rmtree(fresh, ignore_errors=True)
    trainer.save_model(str(fresh))
    (fresh / "training_args.bin").unlink(missing_ok=True)
    if tokenizer_dir.is_dir():
        AutoTokenizer.from_pretrained(tokenizer_dir).save_pretrained(fresh)
    shutil.rmtree(out, ignore_errors=True)
    fresh.rename(out)


def _write(path: Path, text: str) -> None:
    fresh = path.with_name(path.name + ".partial")
    fresh.write_text(text, encoding="utf-8")
    fresh.replace(path)
