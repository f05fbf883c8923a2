"""One run from recipe to folder: data, model, trainer, final model, summary."""

from __future__ import annotations

import json
import shutil
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, PrinterCallback, TrainerState, set_seed
from transformers.utils.logging import disable_progress_bar

from mor.config import MoRConfig
from mor.errors import Interrupted, MorError
from mor.hf.bos import save_tokenizer
from mor.hf.modeling import MoRForCausalLM
from mor.model.flops import count_parameters
from mor.provenance import provenance
from mor.train.arguments import training_arguments
from mor.train.callbacks import EndOfRunCallback, JsonLogCallback, ProgressCallback
from mor.train.data import EpochCallback, indexes, open_run_data
from mor.train.distributed import (
    check_parallel,
    check_ranks,
    eval_batch_size,
    leaves_unused,
    shard,
    world_size,
)
from mor.train.guards import clear_stops
from mor.train.plan.budget import Plan, plan_budget
from mor.train.recipe.recipe import Recipe
from mor.train.recipe.uptrain import UptrainSection
from mor.train.state import checkpoints
from mor.train.state.branches import fan, retuned
from mor.train.state.run_folder import LOG, MODEL, RECIPE, SUMMARY, read_recipe, write_whole
from mor.train.state.start import data_digest, starting_point
from mor.train.trainer import MoRTrainer, peak_memory_bytes
from mor.train.uptrain.costs import uptrain_costs
from mor.train.uptrain.start import check_origin, keep_map, settled
from mor.train.uptrain.trainer import Uptraining


def train(
    recipe: Recipe,
    *,
    resume: bool = False,
    overwrite: bool = False,
    resume_from: str | Path | None = None,
) -> Path:
    """Train what ``recipe`` says and leave a run folder (:mod:`mor.train.state.run_folder`).

    Ctrl-C, SIGTERM and SIGUSR1 end it after the step at hand, with a checkpoint. A recipe with
    ``train.branches`` leaves a folder for each of them as well (:mod:`mor.train.state.branches`).

    Args:
        recipe: validated.
        resume: continue from the newest checkpoint of the run folder, or from step 0 where it was
            stopped before its first.
        overwrite: replace a run folder that is already there.
        resume_from: continue from this checkpoint of the run folder; newer ones are set aside.

    Returns:
        The run folder.

    Raises:
        MorError: the data folder is wrong, the run exists already, nothing to resume from (an
            existing run is then as it was); or a checkpoint is damaged; or the loss is no longer
            a number, the disk is full, memory ran out (checkpoints stay).
        Interrupted: asked to stop; ``resume`` goes on.
    """
    recipe = settled(recipe)
    if not recipe.train.branches:
        with ExitStack() as stack:
            return _train(
                recipe, stack, resume=resume, overwrite=overwrite, resume_from=resume_from
            )
    parts = with_branches(recipe)
    if not (resume or overwrite or resume_from):
        taken = [part.run_dir for part in parts if part.run_dir.exists()]
        if taken:  # said now, not after a week
            raise MorError(
                f"{taken[0]} already holds a run; use --resume, --overwrite or another name"
            )
    for part in parts:
        going = (resume or resume_from is not None) and part.run_dir.exists()
        if going and (part.run_dir / SUMMARY).is_file() and part is not parts[-1]:
            continue
        here = resume_from if part is parts[0] else None
        with ExitStack() as stack:
            _train(part, stack, resume=going, overwrite=overwrite, resume_from=here)
    return parts[0].run_dir


def with_branches(recipe: Recipe) -> list[Recipe]:
    """The recipe itself, or the run and the branches that its ``train.branches`` asks for.

    Raises:
        MorError: the data folder is wrong, or a branch does not fit into the run.
    """
    recipe = settled(recipe)
    section = recipe.train
    if not section.branches:
        return [recipe]
    index = indexes(recipe.data)[0]
    config = recipe.model_config_for(index.vocab_size, index.eos_token_id, index.known_bos())
    per_step = recipe.sequences_per_step(world_size())
    budgets = [section.budget, *section.branches]
    length = recipe.data.seq_len
    plans = [plan_budget(budget, config, length, per_step * length) for budget in budgets]
    return fan(recipe, [plan.steps for plan in plans])


def _train(
    recipe: Recipe,
    stack: ExitStack,
    *,
    resume: bool,
    overwrite: bool,
    resume_from: str | Path | None,
) -> Path:
    """One run; what ``stack`` is given here is kept until the run has ended."""
    data, section = recipe.data, recipe.train
    check_parallel(recipe)
    if section.threads:
        torch.set_num_threads(section.threads)
    disable_progress_bar()  # one bar is enough: ours
    per_step = recipe.sequences_per_step(world_size())
    run_data = open_run_data(recipe, per_step)
    index = run_data.index
    config = recipe.model_config_for(index.vocab_size, index.eos_token_id, index.known_bos())
    plan = plan_budget(section.budget, config, data.seq_len, per_step * data.seq_len)
    facts = {"sequences_per_step": per_step, "data": data_digest(run_data.stream.parts)}
    # All that can be refused is, before the folder is taken.
    uptraining = None if recipe.uptrain is None else Uptraining(recipe, config, index, facts)
    if uptraining is not None:
        facts |= uptraining.facts
    arguments = training_arguments(recipe, plan, find_unused=leaves_unused(config))
    arguments.per_device_eval_batch_size = eval_batch_size(
        len(run_data.validation), section.batch_size
    )
    with arguments.main_process_first(local=False, desc="run folder"):
        first = arguments.process_index == 0
        checkpoint = starting_point(
            recipe, plan, facts, stack, first, resume, overwrite, resume_from
        )
    if checkpoint is not None:
        check_ranks(recipe, checkpoint)
        check_origin(checkpoint, facts)
    trainer, end = None, EndOfRunCallback(section.saves_at)
    log, progress = JsonLogCallback(recipe.run_dir / LOG), ProgressCallback(recipe.name)
    stack.enter_context(clear_stops(recipe, lambda: trainer.state.global_step if trainer else 0))
    set_seed(section.seed)
    model = MoRForCausalLM(config) if uptraining is None else uptraining.model
    model.model.gradient_checkpointing = section.gradient_checkpointing
    model.model.use_compiled_layers(section.compile)
    if section.parallel == "fsdp":
        shard(model, arguments.device, regather=section.fsdp_regather, dtype=section.dtype)
    make: Any = MoRTrainer
    stream = run_data.stream.take(plan.steps * per_step)
    if uptraining is not None:
        make, stream = uptraining.trainer(stream, arguments)
    trainer = make(
        model=model,
        args=arguments,
        train_dataset=stream,
        eval_dataset=run_data.validation,
        seq_len=data.seq_len,
        auxiliary_router_lr_factor=section.auxiliary_router_lr_factor,
        peak_flops=section.peak_flops,
        callbacks=[EpochCallback(run_data.stream), end, log, progress],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.checkpoint_facts, trainer.keeps = facts, section.saves_at
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
    _save_model(trainer, index.tokenizer_dir, recipe.run_dir / MODEL, recipe.uptrain)
    if trainer.is_world_process_zero():
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
    origin = recipe.train.branch_from
    shared = 0 if origin is None else checkpoints.step_of(origin)
    branched = (
        {}
        if origin is None
        else {
            "branched_from": str(origin),
            "branch_changes": _changes(recipe, origin),
            "branched_at_step": shared,
            # What this run trained itself; every other count holds the shared steps too.
            "own_tokens": (steps - shared) * plan.tokens_per_step,
            "own_flops": trainer.flops_until(steps) - trainer.flops_until(shared),
        }
    )
    uptrained: dict[str, Any] = {}
    if (up := recipe.uptrain) is not None:
        costs = uptrain_costs(recipe, config)
        uptrained = {
            "started_from": str(up.start),
            "teacher": None if up.distill is None else str(up.distill.teacher),
            "trained_parameters": costs.trained,
            # Where it is cached another run may have paid, or will gain.
            "teacher_flops": None
            if costs.cached
            else costs.teacher_flops * steps * plan.tokens_per_step,
        }
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
        "mfu": trainer.last_logged("mfu"),
        "peak_memory_bytes": peak_memory_bytes(),
        "seed": recipe.train.seed,
        "seq_len": recipe.data.seq_len,
        "dtype": recipe.train.dtype,
        "threads": torch.get_num_threads(),
        **branched,
        **uptrained,
    } | provenance(device)


def _changes(recipe: Recipe, origin: Path) -> dict[str, Any] | None:
    """What a branch changed of the optimiser; None where its source is gone since."""
    path = origin.expanduser().parent.parent / RECIPE
    if not path.is_file():
        return None
    return {name: pair[1] for name, pair in retuned(read_recipe(path), recipe).items()}


def _save_model(
    trainer: MoRTrainer, tokenizer_dir: Path, out: Path, up: UptrainSection | None = None
) -> None:
    """Write ``model/`` beside, then move it into place. All ranks call: they may hold shards."""
    fresh = out.with_name(out.name + ".partial")
    if trainer.is_world_process_zero():
        shutil.rmtree(fresh, ignore_errors=True)
    trainer.save_model(str(fresh))
    if not trainer.is_world_process_zero():
        return
    (fresh / "training_args.bin").unlink(missing_ok=True)
    if tokenizer_dir.is_dir():
        save_tokenizer(
            AutoTokenizer.from_pretrained(tokenizer_dir),
            MoRConfig.from_pretrained(fresh),
            fresh,
        )
    if up is not None:
        keep_map(up, fresh)
    checkpoints.flush(fresh)
    shutil.rmtree(out, ignore_errors=True)
    fresh.rename(out)
