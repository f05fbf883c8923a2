"""``mor train`` and ``mor recipes``."""

from __future__ import annotations

import os
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from mor.model.flops import count_parameters, flops_per_token
from mor.train import Recipe, load_recipe, plan_budget
from mor.train import train as run_training
from mor.train.data import indexes, passes
from mor.train.recipe_file import builtin_recipes


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
    overwrite: Annotated[bool, typer.Option(help="replace the run folder")] = False,
    dry_run: Annotated[bool, typer.Option(help="check and print the plan, train nothing")] = False,
) -> None:
    """Train what RECIPE says; leaves a run folder with model, log and summary."""
    loaded = load_recipe(recipe, set_)
    if dry_run:
        show_plan(loaded)
        return
    folder = run_training(loaded, resume=resume, overwrite=overwrite)
    typer.echo(f"trained: {folder}")


def recipes() -> None:
    """List the recipes that come with mor."""
    for name in builtin_recipes():
        typer.echo(name)


def show_plan(recipe: Recipe) -> None:
    """Print parameters, steps, tokens and FLOPs of a recipe."""
    index = indexes(recipe.data)[0]
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
    table.add_row("passes over the data", passes(recipe.data, plan.tokens))
    Console().print(table)
