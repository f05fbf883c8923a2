"""One run from recipe to folder: data, model, loop, final model, summary."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, set_seed
from transformers.utils.logging import disable_progress_bar

from mor.config import MoRConfig
from mor.data.media import MediaIndex
from mor.errors import Interrupted, MorError
from mor.hf.bos import save_tokenizer
from mor.hf.captions import caption_processor
from mor.hf.processors import save_processor
from mor.hf.register import class_for
from mor.ops.ranks import world_size
from mor.run_files import SUMMARY
from mor.train.classify.data import resolve_media
from mor.train.classify.objective import Labels
from mor.train.classify.validation import validate_examples
from mor.train.data import RunData, digest_data, find_config, load_batches, open_run_data
from mor.train.distributed import (
    Parallel,
    check_parallel,
    check_ranks,
    eval_batch_size,
    first_process_first,
    join_ranks,
    leaves_unused,
    rank,
    shard,
)
from mor.train.guards import FiniteGuard, explain_stops
from mor.train.logs.log import RunLog
from mor.train.logs.meter import Meter, peak_memory_bytes
from mor.train.logs.reporters import open_reporters
from mor.train.loop import Loop
from mor.train.objective import NextToken, Objective
from mor.train.plan.budget import Plan, PlannedFlops, plan_budget
from mor.train.plan.depth import depth_schedule_of
from mor.train.recipe.recipe import Recipe
from mor.train.state import sharded
from mor.train.state.branches import expand_branches
from mor.train.state.run_folder import RunFolder
from mor.train.state.summary import summarise
from mor.train.step.backward import make_backward
from mor.train.uptrain.by_loss import RouteByLoss, check_route_by_loss
from mor.train.uptrain.start import check_origin, keep_map, resolve_model
from mor.train.uptrain.uptraining import Uptraining
from mor.train.validation import validate


def train(
    recipe: Recipe,
    *,
    resume: bool = False,
    overwrite: bool = False,
    resume_from: str | Path | None = None,
) -> Path:
    """Train what ``recipe`` says and leave a run folder (:mod:`mor.run_files`).

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
            finite, the disk is full, memory ran out (checkpoints stay).
        Interrupted: asked to stop; ``resume`` goes on.
    """
    recipe = resolve_media(resolve_model(recipe))
    if not recipe.train.branches:
        return _train(recipe, resume=resume, overwrite=overwrite, resume_from=resume_from)
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
        _train(part, resume=going, overwrite=overwrite, resume_from=here)
    return parts[0].run_dir


def with_branches(recipe: Recipe, config: MoRConfig | None = None) -> list[Recipe]:
    """The recipe itself, or the run and the branches that its ``train.branches`` asks for.

    Args:
        recipe: validated.
        config: of the model, where the data is not there to say its vocabulary.

    Raises:
        MorError: the data folder is wrong, or a branch does not fit into the run.
    """
    recipe = resolve_media(resolve_model(recipe))
    section = recipe.train
    if not section.branches:
        return [recipe]
    config = find_config(recipe) if config is None else config
    per_step = recipe.sequences_per_step(world_size())
    budgets = [section.budget, *section.branches]
    length = recipe.data.seq_len
    schedule = depth_schedule_of(section, config.num_recursions)
    plans = [plan_budget(each, config, length, per_step * length, schedule) for each in budgets]
    return expand_branches(recipe, [plan.steps for plan in plans])


def _train(
    recipe: Recipe, *, resume: bool, overwrite: bool, resume_from: str | Path | None
) -> Path:
    """One run. All that can be refused is refused before its folder is taken."""
    section = recipe.train
    check_parallel(recipe)
    if section.threads:
        torch.set_num_threads(section.threads)
    disable_progress_bar()  # one bar is enough: ours
    per_step = recipe.sequences_per_step(world_size())
    data = open_run_data(recipe, per_step)
    index = data.index
    config = find_config(recipe, index)
    if section.route_by_loss is not None:
        check_route_by_loss(recipe, config)
    length = recipe.data.seq_len
    schedule = depth_schedule_of(section, config.num_recursions)
    plan = plan_budget(section.budget, config, length, per_step * length, schedule)
    digest = digest_data(data.samples.parts)
    facts: dict[str, Any] = {"sequences_per_step": per_step, "data": digest}
    uptraining = None
    if recipe.uptrain is not None:
        uptraining = Uptraining(recipe, config, index, digest)
        facts |= uptraining.facts
    reporters = open_reporters(recipe, plan.steps)
    device = join_ranks()
    _check_dtype(recipe, device)
    first = rank() == 0
    with RunFolder(recipe, facts, first=first, device=device) as folder:
        with first_process_first():
            checkpoint = folder.begin(
                plan.steps, resume=resume, overwrite=overwrite, resume_from=resume_from
            )
        if checkpoint is not None:
            check_ranks(recipe, checkpoint)
            check_origin(checkpoint, facts)
        log = RunLog(folder.log, recipe.name, plan.steps, first=first, reporters=reporters)
        loop: Loop | None = None
        with explain_stops(recipe, lambda: loop.step if loop else 0):
            loop = make_loop(recipe, config, plan, data, log, device, uptraining, folder)
            if checkpoint is not None:
                loop.load(checkpoint)
            loop.run()
            if loop.stopped:
                raise Interrupted(
                    f"stopped at step {loop.step} of {plan.steps}, checkpoint kept in "
                    f"{folder.checkpoints}; go on with the same command and --resume"
                )
            _publish(recipe, config, loop, data, folder)
    return recipe.run_dir


def _check_dtype(recipe: Recipe, device: torch.device) -> None:
    bfloat16 = recipe.train.dtype == "bfloat16"
    if bfloat16 and device.type == "cuda" and not torch.cuda.is_bf16_supported():
        raise MorError("train.dtype=bfloat16 is not supported by this GPU; use float32")


def make_loop(
    recipe: Recipe,
    config: MoRConfig,
    plan: Plan,
    data: RunData,
    log: RunLog,
    device: torch.device,
    uptraining: Uptraining | None,
    folder: RunFolder,
) -> Loop:
    """The loop of a run, at step 0: model, objective and data put together."""
    section, ranks = recipe.train, world_size()
    set_seed(section.seed)
    model: Any = class_for(config)(config) if uptraining is None else uptraining.model
    model.model.gradient_checkpointing = section.gradient_checkpointing
    model.model.use_compiled_layers(section.compile)
    if section.parallel == "fsdp":
        shard(model, device, regather=section.fsdp_regather, dtype=section.dtype)
    per_step = data.samples.per_step
    whole = data.samples.take(plan.steps * per_step)
    text = config.modality == "text"
    objective: Objective = (NextToken if text else Labels)(section.dtype, section.routing)
    samples: Any = whole
    if uptraining is not None:
        objective, samples = uptraining.prepare(whole, device)
    if section.route_by_loss is not None:  # after what an uptraining would train for without it
        model.model.router.set_confidence(section.route_by_loss.confidence)
        objective = RouteByLoss(section.route_by_loss)
    schedule = depth_schedule_of(section, config.num_recursions)
    caps = None if schedule is None else schedule.caps(plan.steps)
    unused = leaves_unused(config) or caps is not None
    parallel = Parallel(model, device, find_unused=unused, regather=section.fsdp_regather)
    set_seed(section.seed)  # training draws the same numbers however the model was made
    scored = eval_batch_size(len(data.validation), section.batch_size)
    score = validate if text else validate_examples
    meter = Meter(
        config,
        PlannedFlops(config, recipe.data.seq_len, plan.tokens_per_step, caps),
        parallel,
        accumulation=section.accumulation(ranks),
        dtype=section.dtype,
        peak=section.peak_flops,
    )
    return Loop(
        parallel,
        objective,
        section,
        plan.steps,
        read=lambda step: load_batches(
            samples,
            section.batch_size,
            first=step * per_step,
            rank=rank(),
            ranks=ranks,
            workers=section.num_workers,
        ),
        meter=meter,
        log=log,
        rates=None if recipe.uptrain is None else recipe.uptrain.rates,
        validate=lambda: score(parallel, data.validation, scored, section.dtype),
        save=folder.save,
        epoch_at=lambda step: data.samples.epoch_at(step * per_step),
        guard=FiniteGuard(section.learning_rate, folder.checkpoints),
        depth_caps=caps,
        backward=make_backward(recipe, model, parallel),
    )


def _publish(
    recipe: Recipe, config: MoRConfig, loop: Loop, data: RunData, folder: RunFolder
) -> None:
    """Leave the model and the summary: the run is finished. All ranks call."""
    model: Any = loop.parallel.plain
    index = data.index

    def write(out: Path) -> None:
        if loop.parallel.sharded:
            sharded.save_whole(model, out)  # gathered from all ranks
        elif folder.first:
            model.save_pretrained(out)
        if not folder.first:
            return
        if isinstance(index, MediaIndex) and config.modality == "text":
            caption_processor(index, config).save_pretrained(out)
        elif isinstance(index, MediaIndex):
            save_processor(index, out)
        elif index.tokenizer_dir.is_dir():
            save_tokenizer(AutoTokenizer.from_pretrained(index.tokenizer_dir), config, out)
        if recipe.uptrain is not None:
            keep_map(recipe.uptrain, out)

    folder.publish_model(write)
    record = summarise(
        recipe, config, loop.step, loop.meter.flops, loop.log.last, peak_memory_bytes()
    )
    folder.publish_summary(record)
