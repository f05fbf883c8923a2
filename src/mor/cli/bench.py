"""``mor bench``: our engine and its peers on the same requests; the CPU's kernels."""

from __future__ import annotations

import gc
import os
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console

from mor.bench.device import label, parse_device, parse_dtype, refuse_int8
from mor.bench.kernels import measure_kernels
from mor.bench.peers import parse_environments
from mor.bench.serve import Settings, run_serve
from mor.bench.specs import Spec, config_of, default_systems, parse_spec
from mor.bench.tables import curve_table, kernel_table, limit_lines, markdown, notes, rich_tables
from mor.bench.workload import Kind, Lengths, Workload, make_workload
from mor.checks import MAX_SEED, check_real
from mor.cli.common import check_file
from mor.data import VALIDATION, DataIndex
from mor.disk import append_jsonl
from mor.errors import MorError
from mor.provenance import provenance

# The paper's "relative maximum" batch sizes, by R.
RELATIVE = ((2, 42), (3, 48), (4, 51))
# Passes of the paper's own protocol.
PROTOCOL = 32

app = typer.Typer(help="Measure speed.", no_args_is_help=True, add_completion=False)


@app.callback()
def bench() -> None:
    """Measure speed."""


@app.command()
def serve(
    preset: Annotated[
        str, typer.Option(help="shape of the random models: 135m, 360m, ..., tiny")
    ] = "135m",
    recursions: Annotated[str, typer.Option(help="R of the default MoR systems")] = "2,3,4",
    int8: Annotated[
        bool, typer.Option("--int8", help="add the default systems with 8-bit weights")
    ] = False,
    system: Annotated[
        list[str] | None,
        typer.Option(help="one system, repeatable, in place of the default ones; see the docs"),
    ] = None,
    peer_env: Annotated[
        list[str] | None,
        typer.Option(help="NAME=DIR, a peer's virtual environment, repeatable"),
    ] = None,
    workload: Annotated[
        str, typer.Option(help="of paper, prompts, latency, protocol; comma-separated")
    ] = "paper",
    concurrency: Annotated[
        str, typer.Option(help="clients; several make a curve, comma-separated")
    ] = "32",
    requests: Annotated[int, typer.Option(min=1, help="requests of a workload")] = 128,
    scale: Annotated[float, typer.Option(help="multiplies lengths")] = 1.0,
    mean_tokens: Annotated[float, typer.Option(help="mean new tokens, before scale")] = 256.0,
    sd_tokens: Annotated[float, typer.Option(help="their standard deviation")] = 64.0,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="of the paper workload")] = 1,
    prompt_low: Annotated[int, typer.Option(min=1, help="of the prompts workload")] = 64,
    prompt_high: Annotated[int, typer.Option(min=1, help="of the prompts workload")] = 512,
    data: Annotated[
        Path | None, typer.Option(help="data folder: prompts from its validation text")
    ] = None,
    pass_tokens: Annotated[
        int | None, typer.Option(min=1, help="most new tokens in a pass of our engine")
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="turns over all systems")] = 3,
    check_requests: Annotated[int, typer.Option(min=1, help="compared before timing")] = 3,
    check_tokens: Annotated[int, typer.Option(min=1, help="of each of them")] = 16,
    p95: Annotated[
        float | None, typer.Option(help="ms: also the best throughput within this limit")
    ] = None,
    threads: Annotated[int, typer.Option(min=0, help="0: all cores this process may use")] = 0,
    seed: Annotated[int, typer.Option(min=0, max=MAX_SEED)] = 0,
    cache: Annotated[
        Path | None, typer.Option(help="keep what is converted for peers in this folder")
    ] = None,
    device: Annotated[str, typer.Option(help="of our systems: cpu, cuda, cuda:N")] = "cpu",
    dtype: Annotated[str, typer.Option(help="of our systems: float32, bfloat16")] = "float32",
    out: Annotated[Path | None, typer.Option(help="JSON lines to append to")] = Path(
        "runs/bench/serve.jsonl"
    ),
    markdown_file: Annotated[
        Path | None, typer.Option("--markdown", help="file for the table in Markdown")
    ] = None,
) -> None:
    """Compare our engine with its own baselines and with peers, interleaved, medians of rounds.

    Tokens are compared before anything is timed. What cannot run is named with the reason.
    """
    check_file(markdown_file)
    check_file(out, folder_exists=False)
    if p95 is not None:
        check_real("p95", p95, 0, open_low=True)
    place, kind_of_number = parse_device(device), parse_dtype(dtype)
    if int8:
        refuse_int8(place, kind_of_number)
    words = system or default_systems(preset, tuple(_numbers("recursions", recursions)), int8)
    specs = tuple(parse_spec(word) for word in words)
    lengths = Lengths(
        mean_tokens,
        sd_tokens,
        prompt_tokens,
        prompt_low,
        prompt_high,
        scale,
        _longest(specs, preset),
    )
    text = None if data is None else _validation_ids(data)
    vocab_size = min(config_of(s, preset).vocab_size for s in specs if s.kind != "peer")
    made: list[Workload] = []
    for name in workload.split(","):
        kind: Kind = name  # type: ignore[assignment]  # make_workload refuses what is no kind
        counts = (
            _numbers("concurrency", concurrency) if name in ("paper", "prompts") else [PROTOCOL]
        )
        for count in counts:
            for relative in ((), RELATIVE) if name == "protocol" else ((),):
                made.append(
                    make_workload(
                        kind,
                        requests,
                        count,
                        vocab_size,
                        lengths,
                        seed,
                        text,
                        pass_tokens,
                        relative,
                    )
                )
    settings = Settings(
        shape=preset,
        specs=specs,
        workloads=tuple(made),
        environments=parse_environments(peer_env or []),
        rounds=rounds,
        check_requests=check_requests,
        check_tokens=check_tokens,
        threads=threads or _cores(),
        seed=seed,
        cache=cache,
        out=out,
        device=place,
        dtype=kind_of_number,
    )
    progress = Console(stderr=True, highlight=False, markup=False)
    gc.freeze()  # as `mor serve` does, and vLLM
    results = run_serve(settings, lambda line: progress.print(line, style="dim"))
    systems = len({row["system"] for row in results.rows})
    console = Console(highlight=False, width=max(80, 32 + 22 * systems))
    for table in rich_tables(results):
        console.print(table)
    names = list(dict.fromkeys(row["system"] for row in results.rows))
    if len({row["clients"] for row in results.rows}) > 2:
        console.print(curve_table(results, names))
    lines = limit_lines(results, p95 / 1e3) if p95 is not None else []
    for line in [*lines, *notes(results)]:
        console.print(line, markup=False)
    load = results.load
    console.print(f"ours: {label(place, kind_of_number)}", markup=False)
    console.print(f"average load {load[0]:.2f} before, {load[-1]:.2f} after", markup=False)
    if markdown_file is not None:
        limit = None if p95 is None else p95 / 1e3
        markdown_file.write_text(
            markdown(results, provenance(results.device), limit), encoding="utf-8"
        )


@app.command()
def kernels(
    preset: Annotated[str, typer.Option(help="whose shapes: 135m, 360m, ..., tiny")] = "135m",
    rows: Annotated[str, typer.Option(help="of the products, comma-separated")] = "16,24,32,48",
    rounds: Annotated[int, typer.Option(min=1, help="the best of so many counts")] = 7,
    threads: Annotated[
        int, typer.Option(min=1, help="1: the thread's CPU time counts; more: the wall clock's")
    ] = 1,
    out: Annotated[Path | None, typer.Option(help="JSON lines to append to")] = Path(
        "runs/bench/kernels.jsonl"
    ),
) -> None:
    """Rate of each kernel of the CPU beside the machine's best, which is measured too."""
    check_file(out, folder_exists=False)
    torch.set_num_threads(threads)
    config = config_of(parse_spec("vanilla"), preset)
    found = measure_kernels(config, _numbers("rows", rows), rounds)
    console = Console(highlight=False, width=100)
    console.print(kernel_table(found))
    header = {"benchmark": "kernels", "preset": preset, "rounds": rounds} | provenance()
    for record in found if out is not None else []:
        assert out is not None
        append_jsonl(out, record | header)


def _numbers(name: str, text: str) -> list[int]:
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < 1:
        raise MorError(f"{name}={text!r} must be whole numbers of at least 1, comma-separated")
    return numbers


def _longest(specs: tuple[Spec, ...], shape: str) -> int:
    """Most tokens that all of our models take."""
    ours = [config_of(spec, shape) for spec in specs if spec.kind != "peer"]
    if not ours:
        raise MorError("system: at least one of our own models has to take part")
    return min(config.max_position_embeddings for config in ours)


def _validation_ids(folder: Path) -> list[int]:
    """Token ids of the validation text, one document after the other."""
    index = DataIndex.load(folder)
    return [int(token) for shard in index.open_shards(VALIDATION) for token in shard.tokens]


def _cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
