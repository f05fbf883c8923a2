"""Commands that are imported when they run, so that ``mor --help`` needs neither torch nor time."""

from __future__ import annotations

import sys
from importlib import import_module
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup
from typer.main import get_command

from mor.checks import is_on

# Each command: where it is, as MODULE:FUNCTION or MODULE:TYPER, and what help says about it.
COMMANDS = {
    "train": (
        "mor.cli.training:train",
        "Train what RECIPE says; leaves a run folder with model, model card, log and summary.",
    ),
    "recipes": ("mor.cli.recipes:recipes", "List the recipes that come with mor."),
    "uptrain": (
        "mor.cli.uptrain:uptrain",
        "Train on from a folded model, or any other, with a teacher if the recipe names one.",
    ),
    "fold": (
        "mor.cli.fold:fold",
        "Make a vanilla model recursive (or routed): shared layers from its own, nothing trained.",
    ),
    "fold-table": (
        "mor.cli.fold:table",
        "NLL before any training of every way of folding, the source first.",
    ),
    "compress": (
        "mor.cli.compress:compress",
        "Make SOURCE smaller or faster: choose layers, uptrain with SOURCE as teacher, report.",
    ),
    "eval": (
        "mor.cli.evaluate:evaluate",
        "NLL under the causal rule, under leaky top-k beside it, and with depth capped at 1..R.",
    ),
    "calibrate": (
        "mor.cli.calibrate:calibrate",
        "Set the router's stored boundaries from a sample, at the same or at new capacities.",
    ),
    "generate": (
        "mor.cli.generate:generate",
        "Go on from PROMPT, streaming; each token's colour tells how many recursions it cost.",
    ),
    "serve": (
        "mor.cli.serve:serve",
        "Serve MODEL over HTTP: /v1/completions, /v1/chat/completions, /metrics, a page at /.",
    ),
    "merge": (
        "mor.cli.merge:merge",
        "Write a checkpoint of any number of ranks as a model folder with one safetensors file.",
    ),
    "study": (
        "mor.cli.study:study",
        "Train and evaluate what a study file says; one report, the paper's numbers beside ours.",
    ),
    "curves": (
        "mor.cli.curves:curves",
        "NLL (of a task: exact answers too) against executed FLOPs, for depth caps and capacities.",
    ),
    "analyse": (
        "mor.cli.analyse:analyse",
        "Which tokens recurse: by part of speech, place in the word, entropy; and what it gave.",
    ),
    "report": (
        "mor.cli.report:report",
        "Write table.md, table.csv, results.jsonl, plots and one self-contained index.html.",
    ),
    "card": (
        "mor.cli.card:card",
        "Evaluate the model of RUN on a sample and write its model card (model/README.md).",
    ),
    "demo": (
        "mor.cli.demo:demo",
        "Train vanilla, recursive and two MoR models to the same FLOPs; compare them honestly.",
    ),
    "data": ("mor.cli.data:app", "Prepare text for training, look at it, verify it."),
    "convert": ("mor.cli.convert:app", "Read checkpoints of others."),
    "export": (
        "mor.cli.export:app",
        "Write models for other programs: Transformers without mor, Llama, GGUF.",
    ),
    "bench": ("mor.cli.bench:app", "Measure speed."),
}


def load_command(name: str) -> Any:
    """Import the module of a command and return the command.

    Transformers is made quiet, unless ``MOR_DEBUG=1``: its errors become one line of ours.
    """
    module, _, attribute = COMMANDS[name][0].partition(":")
    found = getattr(import_module(module), attribute)
    if "transformers" in sys.modules and not is_on("MOR_DEBUG", False):
        logging = import_module("transformers.utils.logging")
        logging.set_verbosity_error()
        logging.disable_progress_bar()
    if not isinstance(found, typer.Typer):
        alone = typer.Typer(add_completion=False)
        alone.command(name)(found)
        found = alone
    return get_command(found)


class LazyGroup(TyperGroup):
    """A group that lists :data:`COMMANDS` without importing them; one is imported when it runs."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        for name, (_, help_) in COMMANDS.items():
            self.add_command(TyperCommand(name, help=help_))

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Name, command and remaining arguments, as the base class finds them; the command real."""
        name, command, rest = super().resolve_command(ctx, args)
        return name, load_command(name) if name in COMMANDS else command, rest
