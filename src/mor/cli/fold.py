"""``mor fold`` and ``mor fold-table``: a vanilla model made recursive."""

from __future__ import annotations

import warnings
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import torch
import typer
from rich.console import Console
from rich.table import Table

from mor.checks import MAX_SEED, check_whole
from mor.cli.common import check_file, open_model, tokenizer_for, write_json
from mor.config import MoRConfig
from mor.config.choices import KVSharing, Relaxation, RouterType, Sharing
from mor.data import DataIndex, PackedDataset
from mor.errors import MorError
from mor.eval.folds import FoldRow, fold_table, text_sequences
from mor.folder.tokenizer import load_tokenizer
from mor.hf.fold.fold import fold_folder
from mor.hf.fold.plan import Folding, Norms, resolve_norms, windows
from mor.model.sharing import Initialization
from mor.provenance import provenance

Init = Literal["step", "average", "lower", "upper", "random", "repeat"]

FULL = ("rank", "full")
LISTED = "one or several with commas between"

Source = Annotated[Path, typer.Argument(help="a vanilla model folder, as `mor convert` writes")]


def fold(
    source: Source,
    out: Annotated[Path, typer.Option(help="model folder to write")],
    sharing: Annotated[Sharing, typer.Option(help="which layers share")] = "middle_cycle",
    num_recursions: Annotated[int, typer.Option(help="R, uses of each shared layer")] = 3,
    init: Annotated[Init, typer.Option(help="layers that the shared ones start from")] = "step",
    norms: Annotated[
        Norms | None,
        typer.Option(help="shared, apart, or each use its source layer's own (default with lora)"),
    ] = None,
    relaxation: Annotated[Relaxation, typer.Option(help="what else differs between uses")] = "none",
    rank: Annotated[str, typer.Option(help="of lora: a number, or full")] = "16",
    alpha: Annotated[float | None, typer.Option(help="of lora: scale x rank")] = None,
    router: Annotated[RouterType, typer.Option(help="who decides on depth")] = "fixed",
    capacities: Annotated[
        str | None, typer.Option(help="per depth, such as 1,0.6,0.3; default (R - depth) / R")
    ] = None,
    capacity_warmup_steps: Annotated[
        int, typer.Option(min=0, help="training steps from full depth to the capacities")
    ] = 1000,
    kv_sharing: Annotated[KVSharing, typer.Option(help="keys and values across depths")] = "none",
    num_prelude_layers: Annotated[
        int | None, typer.Option(min=0, help="private layers before; default 1 for middle_*")
    ] = None,
    num_coda_layers: Annotated[
        int | None, typer.Option(min=0, help="private layers after; default 1 for middle_*")
    ] = None,
    num_recursion_layers: Annotated[
        int | None, typer.Option(min=1, help="layers of the block; default as many as fit")
    ] = None,
    start_gain: Annotated[
        float, typer.Option(help="of gains, for uses away from the shared layer's own place")
    ] = 1.0,
    seed: Annotated[int, typer.Option(min=0, max=MAX_SEED, help="for what is random")] = 0,
) -> None:
    """Make a vanilla model recursive (or routed): shared layers from its own, nothing trained."""
    folding = Folding(
        num_recursions=num_recursions,
        sharing=sharing,
        init=_initialization(init),
        num_prelude_layers=num_prelude_layers,
        num_coda_layers=num_coda_layers,
        num_recursion_layers=num_recursion_layers,
        norms=norms,
        relaxation=relaxation,
        start_gain=start_gain,
        rank=_rank(rank),
        alpha=alpha,
        kv_sharing=kv_sharing,
        router=router,
        capacities=_capacities(capacities),
        capacity_warmup_steps=capacity_warmup_steps,
        seed=seed,
    )
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always", UserWarning)
        folder = fold_folder(source, out, folding, _device())
    for warning in said:
        typer.echo(f"note: {warning.message}", err=True)
    typer.echo(f"folded: {folder}")


def table(
    source: Source,
    text: Annotated[Path | None, typer.Option(help="a held-out text file, UTF-8")] = None,
    data: Annotated[
        Path | None, typer.Option(help="or a folder made by `mor data prepare`: its validation")
    ] = None,
    sharing: Annotated[str, typer.Option(help=LISTED)] = ",".join(get_args(Sharing)),
    num_recursions: Annotated[str, typer.Option(help=LISTED)] = "2,3",
    init: Annotated[str, typer.Option(help=LISTED)] = "step,average,lower,upper,random",
    norms: Annotated[Norms | None, typer.Option(help="default own with lora, else shared")] = None,
    rank: Annotated[str, typer.Option(help=f"of lora, 0 for none, or full; {LISTED}")] = "0",
    leave_out: Annotated[
        int | None,
        typer.Option(help="instead: the source without so many neighbouring layers, at each place"),
    ] = None,
    seq_len: Annotated[
        int | None,
        typer.Option(min=2, help="tokens per sequence; default 512, or as many as the model takes"),
    ] = None,
    max_tokens: Annotated[int, typer.Option(min=2, help="tokens to look at")] = 4096,
    batch_size: Annotated[int, typer.Option(min=1, help="sequences at a time")] = 4,
    seed: Annotated[int, typer.Option(min=0, max=MAX_SEED, help="for init random")] = 0,
    out: Annotated[Path | None, typer.Option(help="also write the rows as JSON")] = None,
) -> None:
    """NLL before any training of every way of folding, the source first."""
    check_file(out)
    ways = product(
        _listed("sharing", sharing, get_args(Sharing)),
        [int(r) for r in _listed("num_recursions", num_recursions)],
        _listed("init", init, get_args(Init)),
        _listed("rank", rank),
    )
    foldings = [
        _with_rank(
            Folding(recursions, how, _initialization(start), norms=norms, seed=seed), of_lora
        )
        for how, recursions, start, of_lora in ways
    ]
    model = open_model(source)
    if leave_out is not None:
        foldings = windows(model.config, leave_out)
    most = model.config.max_position_embeddings
    seq_len = min(512, most) if seq_len is None else seq_len
    check_whole("seq_len", seq_len, 2, most)
    sequences = _sequences(source, model.config, text, data, seq_len, max_tokens)
    console = Console(stderr=True)

    def tell(row: FoldRow) -> None:
        # It may be long until the table is there.
        console.print(*_cells(row, leave_out), highlight=False)

    rows = fold_table(
        model,
        sequences,
        foldings,
        max_sequences=max(1, max_tokens // seq_len),
        batch_size=batch_size,
        device=_device(),
        tell=tell,
    )
    shown = Table("sharing", "R", "init", "norms", "lora rank", "layers", "parameters", "NLL")
    for row in rows:
        shown.add_row(*_cells(row, leave_out))
    Console().print(shown)
    if leave_out is not None:
        best = min(rows[1:], key=lambda row: row.nll)
        typer.echo(
            f"the source misses layers {_window(best, leave_out)} least: NLL {best.nll:z.4f}"
        )
    if out is not None:
        write_json(out, {"rows": [asdict(row) for row in rows]} | provenance(None))


def _window(row: FoldRow, leave_out: int) -> str:
    assert row.folding is not None
    first = row.folding.num_recursion_layers or 0  # what comes before is all in the block
    return f"{first}-{first + leave_out - 1}"


def _cells(row: FoldRow, leave_out: int | None = None) -> list[str]:
    size = [str(row.layers), f"{row.parameters / 1e6:z.1f}M", f"{row.nll:z.4f}"]
    how = row.folding
    if how is None:
        return ["source", "1", "-", "-", "-", *size]
    if leave_out is not None:
        return [f"no {_window(row, leave_out)}", "1", "-", "-", "-", *size]
    lora = how.relaxation == "lora"
    rank = ("full" if how.rank is None else str(how.rank)) if lora else "-"
    return [how.sharing, str(how.num_recursions), how.init, resolve_norms(how), rank, *size]


def _sequences(
    source: Path,
    config: MoRConfig,
    text: Path | None,
    data: Path | None,
    seq_len: int,
    max_tokens: int,
) -> Any:
    if (text is None) == (data is None):
        raise MorError("give --text FILE or --data DIR, one of the two")
    if data is not None:
        tokenizer_for(source, DataIndex.load(data))
        return PackedDataset(data, "validation", seq_len)
    assert text is not None
    return text_sequences(text, load_tokenizer(source), seq_len, max_tokens, config)


def _with_rank(folding: Folding, rank: str) -> Folding:
    if rank == "0":
        return folding
    return replace(folding, relaxation="lora", rank=_rank(rank))


def _listed(name: str, text: str, allowed: tuple[str, ...] | None = None) -> list[Any]:
    """The words of ``text``; whole numbers unless words are given to choose from."""
    words = [word.strip() for word in text.split(",")]
    for word in words:
        if not (word in allowed if allowed else word.isdecimal() or (name, word) == FULL):
            right = f"one of {', '.join(allowed)}" if allowed else "a whole number"
            raise MorError(f"{name}={word!r} is not known; use {right}, or several with commas")
    return words


def _initialization(init: Init) -> Initialization:
    return "stepwise" if init == "step" else init


def _rank(text: str) -> int | None:
    """A rank; None for ``full``."""
    if text == "full":
        return None
    if not text.isdecimal() or int(text) < 1:
        raise MorError(f"rank={text!r} must be a whole number of at least 1, or full")
    return int(text)


def _capacities(text: str | None) -> tuple[float, ...] | None:
    if text is None:
        return None
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise MorError(f"capacities={text!r} must be numbers with commas between") from None


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"
