"""``mor train --dry-run``: what a recipe costs, in parameters, FLOPs, memory and time."""

from __future__ import annotations

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from mor.config import MoRConfig
from mor.errors import MorError
from mor.model.flops import count_parameters, flops_per_token
from mor.ops.ranks import world_size
from mor.train import Recipe, plan_budget
from mor.train.plan.data import plan_data
from mor.train.plan.depth import depth_schedule_of
from mor.train.plan.memory import Memory, estimate_memory
from mor.train.plan.mfu import peak_flops
from mor.train.plan.probe import logged_speed, probe_speed
from mor.train.run import with_branches
from mor.train.uptrain.costs import UptrainCosts, uptrain_costs
from mor.train.uptrain.start import resolve_model


def planned_parts(recipe: Recipe, data_tokens: int | None = None) -> list[Recipe]:
    """The run and its branches, as :func:`mor.train.run.with_branches`; the data need not be there.

    Raises:
        MorError: as :func:`mor.train.plan.data.plan_data`, or a branch does not fit into the run.
    """
    recipe = resolve_model(recipe)
    if not recipe.train.branches:
        return [recipe]
    return with_branches(recipe, plan_data(recipe, data_tokens).config)


def show_plan(recipe: Recipe, *, measure: bool = False, data_tokens: int | None = None) -> None:
    """Print parameters, steps, tokens, FLOPs, memory and time of a recipe; train nothing.

    Args:
        recipe: validated.
        measure: time a few steps now, instead of looking for a log of the same recipe.
        data_tokens: training tokens that the data will have, before it is there.

    Raises:
        MorError: the data is damaged, or is not there to measure with; the budget pays for no step.
    """
    if measure and recipe.data.kind != "text":
        raise MorError(
            f"--measure times texts alone yet, not data.kind={recipe.data.kind!r}; leave it out"
        )
    planned = plan_data(recipe, data_tokens)
    config = planned.config
    section, seq_len = recipe.train, recipe.data.seq_len
    world = world_size()
    schedule = depth_schedule_of(section, config.num_recursions)
    per_step = recipe.sequences_per_step(world) * seq_len
    plan = plan_budget(section.budget, config, seq_len, per_step, schedule)
    total, inner = count_parameters(config)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    more = uptrain_costs(recipe, config, device) if recipe.uptrain is not None else None
    flops = flops_per_token(config, seq_len)
    table = Table("what", "value", title=recipe.name)
    table.add_row("family, router", f"{config.family}, {config.router}")
    table.add_row("unrolled layers", str(config.num_hidden_layers))
    table.add_row("unique parameters", f"{total:,} ({inner:,} without embedding)")
    table.add_row("steps", f"{plan.steps:,}")
    table.add_row("tokens", f"{plan.tokens:,} ({plan.tokens_per_step:,} per step)")
    if schedule is not None:
        shares = np.bincount(schedule.caps(plan.steps))[1:] / plan.steps
        caps = ", ".join(f"{cap}: {share:.0%}" for cap, share in enumerate(shares, 1) if share)
        table.add_row("depth caps, of the steps", caps)
    table.add_row("training FLOPs", f"{plan.flops:.4g} ({flops.training:.4g} per token)")
    if more is not None:
        table.add_row("parameters trained", f"{more.trained:,} ({total - more.trained:,} frozen)")
    if more is not None and more.teacher_parameters:
        spent = more.teacher_flops * plan.tokens
        when = "at most, once per token: it is cached" if more.cached else "it runs along"
        table.add_row("teacher's parameters", f"{more.teacher_parameters:,}")
        table.add_row(
            "teacher's FLOPs", f"{spent:.4g} ({more.teacher_flops:.4g} per token; {when})"
        )
    if planned.note:
        table.add_row("data", planned.note)
    table.add_row("passes over the data", planned.passes(recipe, plan.tokens))
    _add_memory(table, recipe, config, device, more)
    speed = probe_speed(recipe, config) if measure else logged_speed(recipe)
    if speed is None:
        table.add_row("time", "not known: no log of the same recipe (--measure times a few steps)")
    else:
        per_second = plan.flops / plan.tokens * speed.tokens_per_s
        table.add_row("time", f"{duration(plan.tokens / speed.tokens_per_s)}, without evaluation")
        table.add_row("at a speed of", f"{speed.tokens_per_s:,.0f} tokens/s ({speed.source})")
        # Of this machine, as the probe; a log may come from another and has its own `mfu`.
        dtype = torch.bfloat16 if section.dtype == "bfloat16" else torch.float32
        peak = section.peak_flops or (peak_flops(dtype) if measure else None)
        if peak:
            table.add_row("model FLOPs utilisation", f"{per_second / (peak * world):.1%}")
        if speed.peak_memory_bytes:
            table.add_row("peak memory, measured there", size(speed.peak_memory_bytes))
    Console().print(table)


def _add_memory(
    table: Table, recipe: Recipe, config: MoRConfig, device: str, more: UptrainCosts | None
) -> None:
    section = recipe.train

    def estimate(checkpointing: bool) -> Memory:
        return estimate_memory(
            config,
            section.batch_size,
            recipe.data.seq_len,
            section.dtype,
            checkpointing,
            device,
            None if more is None else more.trained,
            0.0 if more is None else more.teacher_bytes,
        )

    chosen = estimate(section.gradient_checkpointing)
    other = estimate(not section.gradient_checkpointing)
    label, opposite = ("with", "without") if section.gradient_checkpointing else ("without", "with")
    table.add_row(
        "memory of a device, estimated",
        f"{size(chosen.total)} {label} gradient checkpointing, {size(other.total)} {opposite}",
    )
    fixed = {"weights": chosen.weights, "gradients": chosen.gradients, "AdamW": chosen.optimiser}
    if chosen.teacher:
        fixed["teacher"] = chosen.teacher
    for name, amount in (fixed | chosen.activations | {"logits and loss": chosen.loss}).items():
        kind = "activations, " if name in chosen.activations else ""
        table.add_row(f"  {kind}{name}", size(amount))


def size(amount: float) -> str:
    """Bytes as MiB or GiB."""
    return f"{amount / 2**30:,.2f} GiB" if amount >= 2**30 else f"{amount / 2**20:,.1f} MiB"


def duration(seconds: float) -> str:
    """Seconds as the two largest of days, hours, minutes, seconds."""
    whole = round(seconds)
    parts: list[str] = []
    for name, unit in (("d", 86400), ("h", 3600), ("min", 60), ("s", 1)):
        count, whole = divmod(whole, unit)
        if count or parts:
            parts.append(f"{count} {name}")
    return " ".join(parts[:2]) or "less than 1 s"
