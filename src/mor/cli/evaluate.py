"""``mor eval`` and ``mor calibrate``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from mor.data import PackedDataset
from mor.eval import calibrate as calibrate_model
from mor.eval import evaluate as evaluate_model
from mor.hf.load import load_model, load_tokenizer
from mor.provenance import provenance


def add_to(app: typer.Typer) -> None:
    """Register the commands."""
    app.command("eval")(evaluate)
    app.command()(calibrate)


Model = Annotated[Path, typer.Argument(help="a model folder or a run folder")]
Data = Annotated[Path, typer.Option(help="a folder made by `mor data prepare`")]


def evaluate(
    model: Model,
    data: Data,
    split: Annotated[str, typer.Option(help="which split")] = "validation",
    seq_len: Annotated[int, typer.Option(help="tokens per sequence")] = 512,
    max_sequences: Annotated[int | None, typer.Option(help="default: the whole split")] = None,
    batch_size: Annotated[int, typer.Option(help="sequences at a time")] = 8,
    out: Annotated[Path | None, typer.Option(help="also write the JSON here")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON only")] = False,
) -> None:
    """NLL under the causal rule, under leaky top-k beside it, and with depth capped at 1..R."""
    loaded, tokenizer = load_model(model), load_tokenizer(model)
    result = run_evaluation(
        loaded, tokenizer, data, split, seq_len, max_sequences, batch_size, quiet=as_json
    )
    if out is not None:
        out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    if as_json:
        typer.echo(json.dumps(result))
    else:
        Console().print(score_table(result))


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
) -> dict[str, Any]:
    """Evaluate with a progress bar on standard error; the result carries its provenance."""
    dataset = PackedDataset(data, split, seq_len)
    with Progress(console=Console(stderr=True), transient=True, disable=quiet) as bar:
        task = bar.add_task("evaluating")

        def tell(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)

        result = evaluate_model(
            model,
            dataset,
            tokenizer,
            max_sequences=max_sequences,
            batch_size=batch_size,
            progress=tell,
        )
    return result | provenance()


def score_table(result: dict[str, Any]) -> Table:
    """The result for a terminal; what is not causal says so."""
    table = Table("rule", "NLL (nats/token)", "perplexity", "bits/byte", "mean depth")
    rows = [("causal", result["causal"])]
    if result["leaky"] is not None:
        rows.append(("leaky top-k (looks ahead, not causal)", result["leaky"]))
    for name, score in rows:
        table.add_row(
            name,
            f"{score['nll']:.4f}",
            f"{score['perplexity']:.2f}",
            f"{score['bits_per_byte']:.4f}",
            f"{score['mean_depth']:.3f}",
        )
    for cap in result["depth_cap"][:-1]:
        table.add_row(
            f"causal, at most {cap['max_depth']} recursion{'s' if cap['max_depth'] > 1 else ''}",
            f"{cap['nll']:.4f}",
            "",
            "",
            f"{cap['mean_depth']:.3f}",
        )
    if result["gap"] is not None:
        table.caption = f"causal minus leaky: {result['gap']:+.4f} nats/token"
    return table


def calibrate(
    model: Model,
    data: Data,
    out: Annotated[Path, typer.Option(help="folder to write the recalibrated model to")],
    capacity: Annotated[
        str | None, typer.Option(help="new capacities, e.g. 1,0.5,0.25; default the model's")
    ] = None,
    split: Annotated[str, typer.Option(help="which split to calibrate on")] = "train",
    seq_len: Annotated[int, typer.Option(help="tokens per sequence")] = 512,
    max_sequences: Annotated[int, typer.Option(help="sequences of the sample")] = 64,
) -> None:
    """Set the router's stored boundaries from a sample, at the same or at new capacities."""
    loaded, tokenizer = load_model(model), load_tokenizer(model)
    capacities = None if capacity is None else parse_capacities(capacity)
    dataset = PackedDataset(data, split, seq_len)
    boundaries = calibrate_model(
        loaded, dataset, max_sequences=max_sequences, capacities=capacities
    )
    claim_folder(out)
    loaded.save_pretrained(out)
    tokenizer.save_pretrained(out)
    shown = ", ".join(f"{b:.4f}" for b in boundaries)
    typer.echo(f"boundaries (logits, by depth): {shown}; written: {out}")


def parse_capacities(text: str) -> list[float]:
    """``1,0.5`` -> [1.0, 0.5].

    Raises:
        typer.BadParameter: not a list of numbers.
    """
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise typer.BadParameter(f"capacity={text!r} must look like 1,0.5,0.25") from None


def claim_folder(out: Path) -> None:
    """Refuse a folder that already holds something."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise typer.BadParameter(f"out={out} already exists and is not an empty folder")
