"""``mor demo``: depth at work, then four twins at equal FLOPs, scored, compared, and heard."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from transformers import set_seed

from mor.cli.common import open_model, write_json
from mor.cli.depth_demo import show_depth_at_work
from mor.cli.evaluate import run_evaluation, sequence_length
from mor.cli.report import show_runs
from mor.data import console_progress, prepare, prompt_tokens
from mor.errors import MorError
from mor.eval.evaluate import token_texts
from mor.folder.tokenizer import load_tokenizer
from mor.hf.generate import generate_with_depths
from mor.report import Sample, build_report, load_runs, render_terminal
from mor.report.style import require_matplotlib
from mor.run_files import EVAL, RECIPE, SUMMARY
from mor.train import Recipe, dump_recipe, load_recipe

TWINS = ("vanilla", "recursive", "expert_choice", "threshold")
PROMPT = "HAMLET.\nTo be, or not to be: "
console = Console(highlight=False)


def demo(
    out: Annotated[Path, typer.Option(help="folder for data, runs and report")] = Path("runs/demo"),
    source: Annotated[str, typer.Option(help="text to learn: as for mor data prepare")] = (
        "shakespeare"
    ),
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="change a field of all four recipes")
    ] = None,
    vocab_size: Annotated[int, typer.Option(help="tokens of the byte-level BPE")] = 2048,
    jobs: Annotated[int, typer.Option(min=1, help="models trained at a time, a core each")] = 2,
) -> None:
    """Train vanilla, recursive and two MoR models to the same FLOPs; compare them honestly.

    Safe to run again: what is there and was made by the same recipe is kept.
    """
    require_matplotlib()  # before minutes of training, not after them
    twin_recipes(out, set_ or [])
    step("1/5 depth at work: a small model that ships")
    show_depth_at_work(out, console)
    step(f"2/5 data: {source}")
    with console_progress() as progress:
        index = prepare(source, out / "data", vocab_size=vocab_size, progress=progress)
    kept = "kept from an earlier run" if index.reused else "prepared"
    console.print(f"{kept}: {index.num_tokens('train'):,} training tokens")
    step(f"3/5 training four models to the same FLOPs, {jobs} at a time on one core each")
    runs = train_twins(out, set_ or [], jobs)
    step("4/5 evaluation: causal, leaky, and with depth capped")
    for run in runs:
        evaluate_twin(run, out / "data")
    step("5/5 report")
    spoken = {runs[-1].name: [write_passage(runs[-1])]}
    page = build_report(runs, out / "report", title="Four twins at equal FLOPs", passages=spoken)
    loaded = load_runs(runs)
    show_runs(loaded)
    sample = spoken[runs[-1].name][0]
    console.print(f"\n[bold]{runs[-1].name} writes, each token coloured by its depth:[/bold]\n")
    recursions = loaded[-1].summary.num_recursions
    console.print(render_terminal(sample.tokens, sample.depths, recursions))
    console.print(f"\n[bold]report:[/bold] {page}")


def step(text: str) -> None:
    """Print the heading of a step."""
    console.print(f"\n[bold cyan]{text}[/bold cyan]")


def train_twins(out: Path, overrides: list[str], jobs: int) -> list[Path]:
    """Train all twins, ``jobs`` at a time; returns their run folders in the order of the table.

    Each has a process of its own, so that its peak memory is its own, and one CPU thread: two
    processes of one thread use two cores better than one of two, whatever else the machine does.
    """
    changes, recipes = twin_recipes(out, overrides)
    waiting = []
    for name, recipe in recipes.items():
        if is_finished(recipe):
            console.print(f"{recipe.name}: kept from an earlier run")
        else:
            waiting.append(name)
    with ThreadPoolExecutor(jobs) as pool:
        codes = list(pool.map(lambda name: train_twin(name, changes), waiting))
    for name, code in zip(waiting, codes, strict=True):
        if code != 0:
            raise MorError(f"training of {name} stopped; what it said stands above")
    return [recipe.run_dir for recipe in recipes.values()]


def twin_recipes(out: Path, overrides: list[str]) -> tuple[list[str], dict[str, Recipe]]:
    """The changes of the recipes that ship, and the recipes with them.

    Raises:
        MorError: an override does not fit.
    """
    changes = [f"data.path={out / 'data'}", f"output={out}", "train.threads=1", *overrides]
    return changes, {name: load_recipe(f"demo/{name}", changes) for name in TWINS}


def train_twin(name: str, changes: list[str]) -> int:
    """Run ``mor train`` and pass on what it says; returns its exit status."""
    command = [sys.executable, "-m", "mor.cli", "train", f"demo/{name}", "--overwrite"]
    for change in changes:
        command += ["--set", change]
    with subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, encoding="utf-8"
    ) as process:
        assert process.stderr is not None
        for line in process.stderr:
            console.print(line.rstrip(), markup=False)
    return process.returncode


def is_finished(recipe: Recipe) -> bool:
    """Whether the run folder holds a finished run of this very recipe."""
    trained = recipe.run_dir / RECIPE
    if not (recipe.run_dir / SUMMARY).is_file() or not trained.is_file():
        return False
    return trained.read_text(encoding="utf-8") == dump_recipe(recipe)


def evaluate_twin(run: Path, data: Path) -> None:
    """Write eval.json unless it is newer than the model."""
    result_path, model_path = run / EVAL, run / SUMMARY
    if result_path.is_file() and result_path.stat().st_mtime > model_path.stat().st_mtime:
        console.print(f"{run.name}: kept from an earlier run")
        return
    model, tokenizer = open_model(run), load_tokenizer(run)
    seq_len = sequence_length(run, model.config, None)
    result = run_evaluation(model, tokenizer, data, "validation", seq_len, 256, 16)
    write_json(result_path, result)
    console.print(f"{run.name}: causal NLL {result['causal']['nll']:z.4f}")


def write_passage(run: Path, length: int = 160) -> Sample:
    """A passage that the model writes, with the depth each token cost."""
    model, tokenizer = open_model(run), load_tokenizer(run)
    set_seed(0)
    ids = torch.tensor([prompt_tokens(PROMPT, tokenizer, model.config)], device=model.device)
    tokens, depths = generate_with_depths(
        model, ids, max_new_tokens=length, do_sample=True, temperature=0.8, top_k=50
    )
    with torch.inference_mode():
        prompt_depths = model(ids, use_cache=False).depths[0].tolist()
    return Sample(
        tokens=token_texts(tokenizer, [*ids[0].tolist(), *tokens]),
        depths=[*prompt_depths, *depths],
        title=f"{run.name} writes (temperature 0.8)",
    )
