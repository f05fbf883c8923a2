"""One run from recipe to folder: data, model, trainer, final model, summary."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, PrinterCallback, TrainerState, set_seed
from transformers.utils.logging import disable_progress_bar

from mor.errors import MorError
from mor.hf.modeling import MoRForCausalLM
from mor.model.flops import count_parameters
from mor.provenance import provenance
from mor.train.arguments import training_arguments
from mor.train.budget import Plan, plan_budget
from mor.train.callbacks import EndOfRunCallback, JsonLogCallback, ProgressCallback
from mor.train.data import EpochCallback, open_run_data
from mor.train.folder import CHECKPOINTS, LOG, MODEL, SUMMARY, claim, last_checkpoint, write_whole
from mor.train.recipe import Recipe
from mor.train.trainer import MoRTrainer, peak_memory_bytes


class Interrupted(MorError):
    """Training ended early because it was asked to; the message says how to go on."""


def train(recipe: Recipe, *, resume: bool = False, overwrite: bool = False) -> Path:
    """Train what ``recipe`` says and leave a run folder (:mod:`mor.train.folder`).

    Ctrl-C and SIGTERM end it after the step at hand, with a checkpoint.

    Args:
        recipe: validated.
        resume: continue from the newest checkpoint of the run folder.
        overwrite: replace a run folder that is already there.

    Returns:
        The run folder.

    Raises:
        MorError: the data folder is wrong, the run exists already, nothing to resume from (an
            existing run is then as it was); or the loss is no longer a number (checkpoints stay).
        Interrupted: asked to stop; ``resume`` goes on.
    """
    data, section = recipe.data, recipe.train
    if section.threads:
        torch.set_num_threads(section.threads)
    disable_progress_bar()  # one bar is enough: ours
    per_step = recipe.sequences_per_step(int(os.environ.get("WORLD_SIZE", "1")))
    run_data = open_run_data(recipe, per_step)
    index = run_data.index
    config = recipe.model_config_for(index.vocab_size, index.eos_token_id)
    plan = plan_budget(section.budget, config, data.seq_len, per_step * data.seq_len)
    arguments = training_arguments(recipe, plan)
    checkpoint = None
    with arguments.main_process_first(local=False, desc="run folder"):
        if arguments.process_index == 0:
            checkpoint = claim(recipe, resume=resume, overwrite=overwrite)
        elif resume:
            checkpoint = last_checkpoint(recipe.run_dir / CHECKPOINTS)
    set_seed(section.seed)
    model = MoRForCausalLM(config)
    model.model.gradient_checkpointing = section.gradient_checkpointing
    log, end = JsonLogCallback(recipe.run_dir / LOG), EndOfRunCallback()
    progress = ProgressCallback(recipe.name)
    trainer = MoRTrainer(
        model=model,
        args=arguments,
        train_dataset=run_data.stream.take(plan.steps * per_step),
        eval_dataset=run_data.validation,
        seq_len=data.seq_len,
        auxiliary_router_lr_factor=section.auxiliary_router_lr_factor,
        callbacks=[EpochCallback(run_data.stream), end, log, progress],
    )
    trainer.remove_callback(PrinterCallback)
    try:
        with end.listening(alone=arguments.world_size == 1):
            _run(trainer, checkpoint)
    finally:
        progress.close()
    if end.stopped:
        raise Interrupted(
            f"stopped at step {trainer.state.global_step} of {plan.steps}, checkpoint kept in "
            f"{arguments.output_dir}; go on with the same command and --resume"
        )
    if trainer.is_world_process_zero():
        _save_model(trainer, index.tokenizer_dir, recipe.run_dir / MODEL)
        record = summary(recipe, plan, trainer)
        write_whole(recipe.run_dir / SUMMARY, json.dumps(record, indent=2) + "\n")
    return recipe.run_dir


def _run(trainer: MoRTrainer, checkpoint: Path | None) -> None:
    """Train; where the last step was saved and only what follows is missing, load it."""
    if checkpoint is not None:
        state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
        if state.global_step >= trainer.args.max_steps:
            trainer._load_from_checkpoint(str(checkpoint))
            trainer.state = state
            return
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))


def summary(recipe: Recipe, plan: Plan, trainer: MoRTrainer) -> dict[str, Any]:
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
        "eval_nll": trainer.last_logged("eval_loss"),
        "wall_s": trainer.last_logged("elapsed_s"),
        "tokens_per_s": trainer.last_logged("tokens_per_s"),
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
