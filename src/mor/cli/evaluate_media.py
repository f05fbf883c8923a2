"""``mor eval`` of a model of images or sounds, and its tables."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from mor.cli.common import open_any_model, write_json
from mor.data.media import MediaDataset
from mor.errors import MorError
from mor.eval.captions import SAMPLES, evaluate_captions
from mor.eval.examples import evaluate_examples
from mor.eval.keep import keep_result, run_of
from mor.hf.load_media import load_processor
from mor.hf.vision_language import MoRForConditionalGeneration
from mor.provenance import provenance
from mor.run_files import RECIPE, SUMMARY


def evaluate_media(
    model: Path,
    data: Path | None,
    split: str,
    max_examples: int | None,
    batch_size: int,
    out: Path | None,
    as_json: bool,
) -> None:
    """Score a model folder or run folder, print the tables, keep the result in its run.

    Raises:
        MorError: no data is named and the model is of no run, or it does not fit.
    """
    loaded = open_any_model(model)
    dataset = MediaDataset(find_data(model) if data is None else data, split)
    console = Console(stderr=True)
    quiet = as_json or not console.is_terminal
    with Progress(console=console, transient=True, disable=quiet) as bar:
        task = bar.add_task("evaluating")

        def show(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)

        if isinstance(loaded, MoRForConditionalGeneration):
            result = evaluate_captions(
                loaded, load_processor(model), dataset, samples=max_examples or SAMPLES,
                batch_size=batch_size, progress=show,
            )  # fmt: skip
        else:
            result = evaluate_examples(
                loaded, dataset, max_examples=max_examples, batch_size=batch_size, progress=show
            )
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    result |= {"train_flops": training_flops(model)} | provenance(device)
    if out is not None:
        write_json(out, result)
    if as_json:
        typer.echo(json.dumps(result))
    else:
        Console().print(example_table(result))
        if len(result["depth_cap"]) > 1:
            Console().print(cap_table(result))
    if (kept := keep_result(model, result)) is not None:
        typer.echo(kept, err=True)


def find_data(model: Path) -> Path:
    """The folder that a run was trained on.

    Raises:
        MorError: the model is of no run.
    """
    from mor.train import load_recipe

    run = run_of(model)
    path = None if run is None else load_recipe(run / RECIPE).data.path
    if path is None:
        raise MorError("data is missing: give --data DIR, a folder made by mor data prepare")
    return path


def training_flops(model: Path) -> float | None:
    """What the run of a model cost, as planned; None for a model of no run."""
    run = run_of(model)
    if run is None:
        return None
    found = json.loads((run / SUMMARY).read_text(encoding="utf-8")).get("train_flops")
    return None if found is None else float(found)


def example_table(result: dict[str, Any]) -> Table:
    """A row for each rule, and for the same depths dealt out by chance."""
    if result["kind"] == "captions":
        return caption_table(result)
    table = Table("rule", "accuracy", "NLL (nats/example)", "mean depth", "FLOPs of an example")
    whole = "the whole input" if not result["is_causal"] else "looks ahead, not causal"
    rows = [
        ("each token by itself (causal)", result["causal"]),
        (f"top-k of the example ({whole})", result["topk"]),
        ("the same depths, dealt out by chance", result["random_routes"]),
    ]
    for name, score in rows:
        if score is not None:
            table.add_row(name, *_cells(score))
    own = "top-k" if result["rule"] == "topk" else "causal"
    table.caption = f"{result['examples']:,} examples of {result['split']}; the model follows {own}"
    if result.get("train_flops") is not None:
        table.caption += f"; trained with {result['train_flops']:.4g} FLOPs"
    return table


def caption_table(result: dict[str, Any]) -> Table:
    """Exact answers: all, captions, answers to questions; depth of patches or frames, of words."""
    sounds = result["of"] == "audio"
    parts = f"depth of {'frames' if sounds else 'patches'}"
    table = Table("exact", "captions", "questions", "NLL (nats/token)", parts, "words")
    score = result["causal"]
    table.add_row(
        *(f"{score[name]:z.2%}" for name in ("accuracy", "captions_accuracy",
                                             "questions_accuracy")),
        f"{score['nll']:z.4f}", f"{score['patch_depth']:z.3f}", f"{score['word_depth']:z.3f}",
    )  # fmt: skip
    what = "recordings" if sounds else "pictures"
    table.caption = f"{result['examples']:,} {what} of {result['split']}; greedy"
    if result.get("train_flops") is not None:
        table.caption += f"; trained with {result['train_flops']:.4g} FLOPs"
    return table


def cap_table(result: dict[str, Any]) -> Table:
    """What each pass is worth: examples that it put right, and that it spoiled."""
    unit = "token" if result["kind"] == "captions" else "example"
    columns = ("passes", "accuracy", f"NLL (nats/{unit})", "mean depth", "FLOPs of an example")
    table = Table(*columns, "put right", "spoiled")
    for row in result["depth_cap"]:
        changed = [f"{row[name]:,}" if name in row else "" for name in ("fixed", "broke")]
        table.add_row(f"at most {row['max_depth']}", *_cells(row), *changed)
    hard = result["hard_examples"]
    if hard is not None:
        table.caption = (
            f"mean depth of examples answered rightly {hard['depth_of_right']:z.3f}, "
            f"wrongly {hard['depth_of_wrong']:z.3f}"
        )
    return table


def _cells(score: dict[str, Any]) -> tuple[str, str, str, str]:
    return (
        f"{score['accuracy']:z.2%}",
        f"{score['nll']:z.4f}",
        f"{score['mean_depth']:z.3f}",
        f"{score['flops_per_example']:.4g}",
    )
