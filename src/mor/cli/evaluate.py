"""``mor eval``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
import yaml
from rich.box import SIMPLE_HEAD
from rich.console import Console, Group
from rich.progress import Progress
from rich.table import Table

from mor.cli.common import check_file, open_model, tokenizer_for, write_json
from mor.cli.evaluate_media import evaluate_media
from mor.cli.tasks import evaluate_tasks
from mor.data import DataIndex, PackedDataset
from mor.data.media.index import is_media
from mor.errors import MorError
from mor.eval import evaluate as evaluate_model
from mor.eval.answers import list_scores
from mor.eval.keep import keep_result, run_of
from mor.folder.config import is_media_model, load_config
from mor.provenance import provenance
from mor.run_files import DEFAULT_MODEL, HELD_OUT, RECIPE, find_folder

Model = Annotated[Path, typer.Argument(help="a model folder or a run folder")]
Data = Annotated[Path, typer.Option(help="a folder made by `mor data prepare`")]
SeqLen = Annotated[
    int | None,
    typer.Option(min=2, help="tokens per sequence; default a run folder's own, else 512 or less"),
]
BatchSize = Annotated[int, typer.Option(min=1, help="sequences at a time")]


def evaluate(
    model: Annotated[
        Path, typer.Argument(help="a model folder or a run folder; default one that ships")
    ] = DEFAULT_MODEL,
    data: Annotated[
        Path | None,
        typer.Option(help="a folder made by `mor data prepare`; a model that ships has its own"),
    ] = None,
    split: Annotated[str, typer.Option(help="which split")] = "validation",
    seq_len: SeqLen = None,
    max_sequences: Annotated[
        int | None, typer.Option(min=1, help="default: the whole split")
    ] = None,
    batch_size: BatchSize = 8,
    quantization: Annotated[
        str | None, typer.Option(help="int8: also with weights of 8 bits, as mor serve would")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="also write the JSON here")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON only")] = False,
    tasks: Annotated[
        str | None,
        typer.Option(help="few-shot tasks of lm-eval instead: local, paper, or names with commas"),
    ] = None,
    engine: Annotated[
        bool, typer.Option(help="tasks: with the weights that mor serve would use")
    ] = False,
    num_fewshot: Annotated[
        int | None, typer.Option(min=0, help="tasks: examples before each question")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="tasks: questions of each")] = None,
) -> None:
    """NLL under the causal rule, under leaky top-k beside it, and with depth capped at 1..R.

    With --tasks, accuracy on tasks of lm-eval. Of a model of images or sounds: accuracy by both
    rules and by depth cap, and what one answer costs.

    The result of a run is kept in its folder (eval.json), where mor report finds it.
    """
    check_file(out)
    if tasks is not None:
        asked: dict[str, Any] = {"engine": engine, "num_fewshot": num_fewshot, "limit": limit}
        if quantization is not None:
            asked |= {"engine": True, "quantization": quantization}
        evaluate_tasks(model, tasks, data, out, as_json, batch_size=batch_size, **asked)
        return
    if is_media_model(model) or asks_for_captions(model, data):
        if quantization is not None or seq_len is not None:
            raise MorError("--quantization and --seq-len are of models of texts; leave them out")
        evaluate_media(model, data, split, max_sequences, batch_size, out, as_json)
        return
    if data is None:
        data = find_held_out(model)
    loaded = open_model(model)
    index = DataIndex.load(data)
    tokenizer = tokenizer_for(model, index)
    length = sequence_length(model, loaded.config, seq_len, index)
    result = run_evaluation(
        loaded, tokenizer, data, split, length, max_sequences, batch_size,
        quiet=as_json, quantization=quantization,
    )  # fmt: skip
    if out is not None:
        write_json(out, result)
    if as_json:
        typer.echo(json.dumps(result))
    else:
        Console().print(score_table(result))
        if len(result["causal"]["active_fraction"]) > 1:
            Console().print(pass_table(result))
            Console().print(router_table(result))
        if "answers" in result:
            Console().print(answer_table(result["answers"]))
    if (kept := keep_result(model, result)) is not None:
        typer.echo(kept, err=True)


def asks_for_captions(model: Path, data: Path | None) -> bool:
    """Whether a model of text is to say what is in pictures or recordings, not to score texts."""
    if load_config(model).media_token_id is None:
        return False
    return is_media(data) if data is not None else run_of(model) is not None


def find_held_out(model: Path) -> Path:
    """The held-out text beside a model that ships.

    Raises:
        MorError: there is none.
    """
    folder = find_folder(model) / HELD_OUT
    if not folder.is_dir():
        raise MorError("data is missing: give --data DIR, a prepared folder, or --tasks NAMES")
    return folder


def sequence_length(
    folder: Path, config: Any, asked: int | None, index: DataIndex | None = None
) -> int:
    """What was asked for, or what a run folder was trained with, or 512, or the maximum.

    In place of 512 a task's documents have their own length: a question that is cut off from its
    facts has no answer.
    """
    if asked is not None:
        return asked
    try:
        recipe = yaml.safe_load(((run_of(folder) or folder) / RECIPE).read_text(encoding="utf-8"))
        return int(recipe["data"]["seq_len"])
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError):
        whole = None if index is None else index.document_length()
        return min(whole or 512, int(config.max_position_embeddings))


def run_evaluation(
    model: Any,
    tokenizer: Any,
    data: Path,
    split: str,
    seq_len: int,
    max_sequences: int | None,
    batch_size: int,
    *,
    quiet: bool = False,
    quantization: Any = None,
) -> dict[str, Any]:
    """Evaluate with a progress bar on standard error; the result carries its provenance."""
    dataset = PackedDataset(data, split, seq_len)
    console = Console(stderr=True)
    quiet = quiet or not console.is_terminal
    with Progress(console=console, transient=True, disable=quiet) as bar:
        task = bar.add_task("evaluating")

        def show_progress(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)

        result = evaluate_model(
            model,
            dataset,
            tokenizer,
            max_sequences=max_sequences,
            batch_size=batch_size,
            quantization=quantization,
            progress=show_progress,
        )
    device = torch.cuda.get_device_name() if model.device.type == "cuda" else None
    return result | provenance(device)


def score_table(result: dict[str, Any]) -> Table:
    """The result for a terminal; what is not causal says so."""
    table = Table("rule", "NLL (nats/token)", "perplexity", "bits/byte", "mean depth")
    rows = [("causal", result["causal"])]
    if result["leaky"] is not None:
        rows.append(("leaky top-k (looks ahead, not causal)", result["leaky"]))
    if few := result.get("quantized"):
        rows.append((f"causal, {few['quantization']} weights ({few['loss']:+z.4f})", few))
    for name, score in rows:
        table.add_row(
            name,
            f"{score['nll']:z.4f}",
            f"{score['perplexity']:z.2f}",
            f"{score['bits_per_byte']:z.4f}",
            f"{score['mean_depth']:z.3f}",
        )
    if (chance := result.get("random_routes_nll")) is not None:
        lost = chance - result["causal"]["nll"]
        table.add_row(
            f"the same depths, dealt out by chance ({lost:+z.4f})",
            f"{chance:z.4f}",
            "",
            "",
            f"{result['causal']['mean_depth']:z.3f}",
        )
    for cap in result["depth_cap"][:-1]:
        table.add_row(
            f"causal, at most {cap['max_depth']} recursion{'s' if cap['max_depth'] > 1 else ''}",
            f"{cap['nll']:z.4f}",
            "",
            "",
            f"{cap['mean_depth']:z.3f}",
        )
    if result["gap"] is not None:
        table.caption = f"causal minus leaky: {result['gap']:+z.4f} nats/token"
    return table


def pass_table(result: dict[str, Any]) -> Table:
    """What each pass is worth: tokens that it put right and tokens that it spoiled."""
    table = Table("passes", "NLL (nats/token)", "accuracy", "put right", "spoiled")
    for row in result["passes"]:
        changed = [f"{row[name]:,}" if name in row else "" for name in ("fixed", "broke")]
        table.add_row(
            str(row["max_depth"]), f"{row['nll']:z.4f}", f"{row['accuracy']:z.2%}", *changed
        )
    table.caption = f"causal, of {result['tokens']:,} tokens; right: the most likely token is it"
    return table


def answer_table(answers: dict[str, Any]) -> Group:
    """Exact match of a task by difficulty, for each depth cap and for routes by chance."""
    levels = list(answers["causal"]["by_level"])
    title = "answers by difficulty, exact match in %"
    # Eight difficulties and the totals fit into 80 columns; others follow beneath.
    tables = [_make_answer_table(answers, levels[:8], title, totals=True)]
    if levels[8:]:
        tables.append(_make_answer_table(answers, levels[8:], "the others", totals=False))
    causal = answers["causal"]
    if causal["rank_correlation"] is not None:
        tables[-1].caption = (
            f"rank correlation of depth and difficulty: {causal['rank_correlation']:z.3f} over "
            f"queries, {causal['level_rank_correlation']:z.3f} over the means of difficulties"
        )
    return Group(*tables)


def _make_answer_table(
    answers: dict[str, Any], levels: list[Any], title: str, *, totals: bool
) -> Table:
    """One of its tables: some difficulties, with or without the totals over all of them."""
    table = Table(title=title, box=SIMPLE_HEAD, padding=0)
    table.add_column("", no_wrap=True)
    around = (["all"], ["depth", "fixed", "broke"]) if totals else ([], [])
    for heading in [*around[0], *map(str, levels), *around[1]]:
        table.add_column(f" {heading}", justify="right", no_wrap=True)
    for name, score in list_scores(answers):
        shares = [f"{100 * score['by_level'][level]:z.0f}" for level in levels]
        if totals:
            shares.insert(0, f"{100 * score['exact_match']:z.1f}")
            shares.append(f"{score['mean_depth']:z.2f}")
            shares += [str(score.get(key, "")) for key in ("fixed", "broke")]
        table.add_row(name.removeprefix("depth "), *shares)
    causal = answers["causal"]
    depths = [f"{causal['depth_by_level'][level]:z.1f}" for level in levels]
    if totals:
        depths.insert(0, f"{causal['query_depth']:z.2f}")
    table.add_row("depth of queries", *depths)
    return table


def router_table(result: dict[str, Any]) -> Table:
    """What the router did under the causal rule, and how often that rule agrees with training's."""
    router, active = result["router"], result["causal"]["active_fraction"]
    table = Table("depth", "tokens active", "causal rule agrees with training's selection")
    for depth, share in enumerate(active):
        accuracy = f"{router['accuracy'][depth]:z.1%}" if router["accuracy"] else "-"
        table.add_row(str(depth), f"{share:z.1%}", accuracy)
    table.caption = (
        f"dead positions {router['dead_tokens']:z.1%} · MaxVio {router['max_vio']:z.3f} · "
        f"entropy of depths {router['entropy']:z.3f} nats"
    )
    return table
