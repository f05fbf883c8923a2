"""``mor train`` and ``mor recipes``."""

from __future__ import annotations

import json
import os
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from mor.data import DataIndex
from mor.model.flops import count_parameters, flops_per_token
from mor.train import Recipe, load_recipe, plan_budget
from mor.train import train as run_training
from mor.train.recipe_file import builtin_recipes
from mor.train.run import with_branches


def add_to(app: typer.Typer) -> None:
    """Register the commands."""
    app.command()(train)
    app.command()(recipes)


def train(
    recipe: Annotated[str, typer.Argument(help="a YAML file, or a name from `mor recipes`")],
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="change a field: train.learning_rate=1e-3")
    ] = None,
    resume: Annotated[bool, typer.Option(help="continue from the newest checkpoint")] = False,
    resume_from: Annotated[
        str | None, typer.Option(help="continue from this one: checkpoint-40; newer are set aside")
    ] = None,
    branch_from: Annotated[
        str | None, typer.Option(help="begin from a stable RUN/checkpoints/checkpoint-N")
    ] = None,
    overwrite: Annotated[bool, typer.Option(help="replace the run folder")] = False,
    dry_run: Annotated[bool, typer.Option(help="check and print the plan, train nothing")] = False,
) -> None:
    """Train what RECIPE says; leaves a run folder with model, log and summary."""
    branch = [] if branch_from is None else [f"train.branch_from={json.dumps(branch_from)}"]
    loaded = load_recipe(recipe, [*(set_ or []), *branch])
    parts = with_branches(loaded)
    if dry_run:
        for part in parts:
            show_plan(part)
        return
    run_training(loaded, resume=resume, overwrite=overwrite, resume_from=resume_from)
    for part in parts:
        typer.echo(f"trained: {part.run_dir}")


def recipes() -> None:
    """List the recipes that come with mor."""
    for name in builtin_recipes():
        typer.echo(name)


def show_plan(recipe: Recipe) -> None:
    """Print parameters, steps, tokens and FLOPs of a recipe."""
    index = DataIndex.load(recipe.data.path)
    config = recipe.model_config_for(index.vocab_size, index.eos_token_id)
    section, seq_len = recipe.train, recipe.data.seq_len
    per_step = recipe.sequences_per_step(int(os.environ.get("WORLD_SIZE", "1"))) * seq_len
    plan = plan_budget(section.budget, config, seq_len, per_step)
    total, inner = count_parameters(config)
    flops = flops_per_token(config, seq_len)
    table = Table("what", "value", title=recipe.name)
    table.add_row("family, router", f"{config.family}, {config.router}")
    table.add_row("unrolled layers", str(config.num_hidden_layers))
    table.add_row("unique parameters", f"{total:,} ({inner:,} without embedding)")
    table.add_row("steps", f"{plan.steps:,}")
    table.add_row("tokens", f"{plan.tokens:,} ({plan.tokens_per_step:,} per step)")
    table.add_row("training FLOPs", f"{plan.flops:.4g} ({flops.training:.4g} per token)")
    table.add_row(
        "passes over the data", f"{plan.tokens / index.num_tokens(recipe.data.train_split):.2f}"
    )
    Console().print(table)
