"""Time the data loader: tokens/s of every layout, and how long a run takes to find its place.

    python benchmarks/data_loader.py                          # the table of docs/data.md
    python benchmarks/data_loader.py --tokens 2e8 --rounds 3

A synthetic folder (documents of log-normal length, as web text has) is written first. The loader
is the one that training uses: `TrainingSamples` and `ResumableSampler` in the DataLoader that
Accelerate prepares, with Transformers' collator. Before timing, each layout is checked against the
shards themselves. Layouts are interleaved round by round; medians and quartiles are reported.
Resuming is timed from opening the folder to the first batch, at the beginning, middle and end of
the folder and a thousand epochs later; the plans of best-fit packing are made before, once, and
timed apart.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.data_loader import prepare_data_loader
from rich.console import Console
from rich.table import Table
from torch.utils.data import DataLoader
from transformers import default_data_collator

from mor.data import (
    TRAIN,
    VALIDATION,
    DataIndex,
    PackedDataset,
    ResumableSampler,
    ShardWriter,
    TrainingSamples,
)
from mor.disk import append_jsonl
from mor.provenance import provenance

VOCAB, EOS = 49_152, 0
LAYOUTS: dict[str, dict[str, Any]] = {
    "concat": {},
    "concat, document mask": {"document_mask": True},
    "best_fit": {"packing": "best_fit"},
    "best_fit, document mask": {"packing": "best_fit", "document_mask": True},
    "mixture of 3": {"folders": 3},
}


def write_folder(folder: Path, tokens: int, shard_tokens: int, seed: int) -> Path:
    """A prepared folder of random tokens."""
    folder.mkdir()
    draw = np.random.default_rng(seed)
    splits: dict[str, tuple] = {}
    for split, wanted in ((TRAIN, tokens), (VALIDATION, 10_000)):
        infos = []
        while wanted > 0:
            path = folder / f"{split}-{len(infos):05d}.bin"
            with ShardWriter(path, VOCAB) as writer:
                while writer.num_tokens < min(shard_tokens, wanted):
                    size = int(min(draw.lognormal(6.3, 1.0), 100_000)) + 2
                    ids = draw.integers(1, VOCAB, size)
                    ids[-1] = EOS
                    writer.append("", ids, 4 * size)
            assert writer.info is not None
            infos.append(writer.info)
            wanted -= writer.num_tokens
        splits[split] = tuple(infos)
    DataIndex(folder, splits, VOCAB, EOS, "synthetic", "", "", {}).save()
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "tokenizer.json").write_text(
        '{"version":"1.0","truncation":null,"padding":null,"added_tokens":[],"normalizer":null,'
        '"pre_tokenizer":null,"post_processor":null,"decoder":null,"model":{"type":"WordLevel",'
        '"vocab":{"x":0},"unk_token":"x"}}'
    )
    return folder


def open_stream(folders: list[Path], seq_len: int, batch: int, layout: str) -> TrainingSamples:
    """The samples of a run without an end."""
    options = dict(LAYOUTS[layout])
    count = options.pop("folders", 1)
    parts = [
        PackedDataset(folder, TRAIN, seq_len, order_seed=number, **options)
        for number, folder in enumerate(folders[:count])
    ]
    return TrainingSamples(parts, [0.6, 0.3, 0.1][:count], per_step=batch).take(10**15)


def batches(stream: TrainingSamples, start: int, batch: int, workers: int) -> Iterator[dict]:
    """What training sees from sample `start` on."""
    loader = DataLoader(
        stream,
        batch_size=batch,
        sampler=ResumableSampler(stream, lambda: start),
        num_workers=workers,
        collate_fn=default_data_collator,
    )
    return iter(prepare_data_loader(loader, put_on_device=False))


def check(stream: TrainingSamples, batch: int, workers: int) -> None:
    """Batches hold the tokens that the shards hold, document by document, or stop."""
    found = batches(stream, 3 * batch, batch, workers)
    for step in range(3, 6):
        rows = next(found)
        for i in range(batch):
            part, row = stream.locate(step * batch + i)
            want = np.concatenate(
                [
                    part.shards[number].tokens[start : start + length]
                    for number, start, length in part._layout.pieces(row)
                ]
            ).astype(np.int64)
            ids = rows["input_ids"][i]
            good = torch.equal(ids[: len(want)], torch.from_numpy(want))
            if "document_ids" in rows:
                breaks = (ids[:-1] == EOS).long()[: len(want) - 1]
                steps = rows["document_ids"][i].diff()
                inside = steps[: len(want) - 1]
                # A document ends at each end-of-text; a long one may also go on in another row.
                good &= bool((inside >= breaks).all() and (steps[len(want) - 1 :] == 0).all())
            if not good:
                raise SystemExit(f"row {row} is not what the shards hold; nothing is timed")


def main() -> None:
    """Write, check, time, print, record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=float, default=5e8, help="of the largest folder")
    parser.add_argument("--shard-tokens", type=float, default=2**26)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=1.0, help="of each measurement")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--workers", default="0,2", help="comma-separated numbers of processes")
    parser.add_argument("--folder", type=Path, help="where to write; default: a temporary folder")
    parser.add_argument("--out", type=Path, default=Path("runs/bench/data_loader.jsonl"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    console = Console(width=120)
    with tempfile.TemporaryDirectory(dir=args.folder) as place:
        sizes = [args.tokens, args.tokens / 4, args.tokens / 16]
        folders = [
            write_folder(Path(place) / str(n), int(size), int(args.shard_tokens), n)
            for n, size in enumerate(sizes)
        ]
        began = time.perf_counter()
        packed = open_stream(folders, args.seq_len, args.batch, "best_fit").parts[0]
        plan_s = time.perf_counter() - began
        console.print(
            f"{packed.total_tokens:,} tokens, {packed.num_documents:,} documents; best-fit plans "
            f"made in {plan_s:.2f} s, {packed.padding_fraction:.4%} padding"
        )
        common = {
            "tokens": packed.total_tokens,
            "batch": args.batch,
            "seq_len": args.seq_len,
        } | provenance()
        time_loading(args, folders, console, common)
        time_resuming(args, folders, console, common | {"plan_s": plan_s})


def time_loading(
    args: argparse.Namespace, folders: list[Path], console: Console, common: dict
) -> None:
    """Tokens per second of each layout and number of workers."""
    runs: dict[tuple[str, int], Iterator[dict]] = {}
    for workers in map(int, args.workers.split(",")):
        for layout in LAYOUTS:
            stream = open_stream(folders, args.seq_len, args.batch, layout)
            check(stream, args.batch, workers)
            runs[layout, workers] = batches(stream, 0, args.batch, workers)
            next(runs[layout, workers])
    speeds: dict[tuple[str, int], list[float]] = {key: [] for key in runs}
    for _ in range(args.rounds):
        for key, loader in runs.items():
            # Worker processes read ahead while others are timed: take what is waiting first.
            for _ in range(2 * key[1] + 1):
                next(loader)
            count, began = 0, time.perf_counter()
            while (spent := time.perf_counter() - began) < args.seconds:
                next(loader)
                count += 1
            speeds[key].append(count * args.batch * args.seq_len / spent)
    table = Table("layout", "workers", "tokens/s (median)", "quartiles")
    for (layout, workers), values in speeds.items():
        ordered = sorted(values)
        median = statistics.median(ordered)
        low, high = ordered[len(ordered) // 4], ordered[-1 - len(ordered) // 4]
        table.add_row(layout, str(workers), f"{median:,.0f}", f"{low:,.0f}-{high:,.0f}")
        append_jsonl(
            args.out,
            {
                "benchmark": "data_loader",
                "layout": layout,
                "workers": workers,
                "tokens_per_s": median,
                "quartiles": [low, high],
                "rounds": args.rounds,
            }
            | common,
        )
    console.print(table)


def time_resuming(
    args: argparse.Namespace, folders: list[Path], console: Console, common: dict
) -> None:
    """Seconds from opening the folder to the first batch, at several places."""
    table = Table("layout", "position", "seconds to the first batch (median)")
    for layout in LAYOUTS:
        epoch = open_stream(folders, args.seq_len, args.batch, layout).epoch_length
        places = {
            "start": 0,
            "middle": epoch // 2,
            "end": epoch - args.batch,
            "1,000 epochs later": 1000 * epoch + epoch // 2,
        }
        for name, sample in places.items():
            seconds = []
            for _ in range(args.rounds):
                began = time.perf_counter()
                stream = open_stream(folders, args.seq_len, args.batch, layout)
                next(batches(stream, sample, args.batch, 0))
                seconds.append(time.perf_counter() - began)
            median = statistics.median(seconds)
            table.add_row(layout, name, f"{median:.4f}")
            append_jsonl(
                args.out,
                {
                    "benchmark": "data_loader_resume",
                    "layout": layout,
                    "position": name,
                    "sample": sample,
                    "median_s": median,
                    "rounds": args.rounds,
                }
                | common,
            )
    console.print(table)


if __name__ == "__main__":
    main()
