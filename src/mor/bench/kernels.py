"""``mor bench kernels``: each kernel's rate beside the best that this machine can do.

The best is measured too: multiply-adds that stay in registers, and reading a vector that no cache
holds. A product of few rows has to read its weights, one of many rows has to compute: its least
time is the longer of the two, and the share of it that was reached can be compared between
processors.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mor.bench.rates import head_shape, layer_shapes
from mor.config import MoRConfig
from mor.errors import MorError
from mor.ops import native

# Rotated through, so that weights come from memory as those of a model's layers do.
ROTATED_BYTES = 200 << 20
# Of a training batch: rows and tokens of each.
TRAINING = ((8, 512), (16, 256))
CONTEXT = 512
_PAGE = 16


@dataclass(frozen=True)
class Best:
    """What the machine does at best.

    Attributes:
        flops_per_s: multiply-adds in registers, two FLOPs each.
        bytes_per_s: reading memory in one stretch.
    """

    flops_per_s: float
    bytes_per_s: float

    def seconds(self, flops: float, nbytes: float) -> float:
        """The least time for work that computes and reads so much."""
        return max(flops / self.flops_per_s, nbytes / self.bytes_per_s)


@dataclass(frozen=True)
class Case:
    """One kernel at one size.

    Attributes:
        kind, name, rows: what it is.
        flops, nbytes: what it has to compute and to read; nbytes 0: all is in a cache.
        call: runs it as often in a row as told.
        wide: how many times the FLOPs of float32 one instruction does: 4 with bytes.
    """

    kind: str
    name: str
    rows: int
    flops: float
    nbytes: float
    call: Callable[[int], object]
    wide: int = 1


def measure_kernels(
    config: MoRConfig,
    rows: list[int],
    rounds: int = 7,
    rotated_bytes: int = ROTATED_BYTES,
    training: tuple[tuple[int, int], ...] = TRAINING,
) -> list[dict[str, Any]]:
    """One record per kernel and size; the first is the machine's best.

    On one thread its CPU time counts, so that other processes disturb little; on several the wall
    clock's. Sizes of a kernel take turns, and the best of ``rounds`` counts.

    Raises:
        MorError: there are no kernels here.
    """
    if native.library() is None:
        raise MorError(f"there are no kernels to measure: {native.missing()}")
    best = measure_best(rounds, 2 * rotated_bytes)
    records: list[dict[str, Any]] = [
        {
            "kind": "machine",
            "gflop_per_s": best.flops_per_s / 1e9,
            "gb_per_s": best.bytes_per_s / 1e9,
            "threads": torch.get_num_threads(),
        }
    ]
    groups = (
        _products(config, rows, rotated_bytes),
        _paged(config, rows),
        _training(config, training),
    )
    for group in groups:
        for cases in group:
            for case, seconds in zip(cases, _times(cases, rounds), strict=True):
                records.append(_record(case, seconds, best))
    return records


def measure_best(rounds: int, size: int) -> Best:
    """The machine's rates over PyTorch's number of threads; ``size`` bytes are read."""
    vector = torch.ones(size // 4 // 128 * 128)
    steps = 100_000
    flops = native.spin(1)

    def read_vector(times: int) -> None:
        for _ in range(times):
            native.read_through(vector)

    cases = [
        Case("", "", 0, flops, 0, lambda n: native.spin(n * steps)),
        Case("", "", 0, 0, 0, read_vector),
    ]
    compute, read = _times(cases, rounds)
    return Best(flops * steps / compute, vector.nbytes / read)


def _record(case: Case, seconds: float, best: Best) -> dict[str, Any]:
    return {
        "kind": case.kind,
        "name": case.name,
        "rows": case.rows,
        "us": seconds * 1e6,
        "gflop_per_s": case.flops / seconds / 1e9,
        "gb_per_s": case.nbytes / seconds / 1e9,
        "of_best": best.seconds(case.flops / case.wide, case.nbytes) / seconds,
    }


def _times(cases: list[Case], rounds: int, least: float = 0.01) -> list[float]:
    """Seconds of one call of each, the best of ``rounds`` stretches that take turns."""
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    counts, found = [], [math.inf] * len(cases)
    with torch.no_grad():
        for case in cases:
            case.call(1)
            began = clock()
            case.call(1)
            counts.append(max(1, math.ceil(least / max(clock() - began, 1e-6))))
        for _ in range(rounds):
            for i, (case, count) in enumerate(zip(cases, counts, strict=True)):
                began = clock()
                case.call(count)
                found[i] = min(found[i], (clock() - began) / count)
    return found


def _products(config: MoRConfig, rows: list[int], rotated: int) -> Iterator[list[Case]]:
    """Packed products of a layer and of the head, float32 and 8 bits."""
    for inputs, outputs in [*dict.fromkeys(layer_shapes(config)), head_shape(config)]:
        for int8 in (False, True):
            size = inputs * outputs * (1 if int8 else 4)
            copies = max(1, math.ceil(rotated / size)) if rotated > size else 1
            weight = torch.randn(outputs, inputs)
            packed = [native.PackedLinear([weight], [None], int8=int8) for _ in range(copies)]
            name = f"{inputs}x{outputs}" + (" int8" if int8 else "")
            yield [
                Case(
                    "product",
                    name,
                    count,
                    2.0 * count * inputs * outputs,
                    packed[0].nbytes,
                    _rotating(packed, torch.randn(count, inputs)),
                    4 if int8 else 1,
                )
                for count in rows
            ]


def _rotating(packed: list[native.PackedLinear], x: Tensor) -> Callable[[int], object]:
    work, turn = native.Workspace(), 0

    def call(times: int) -> None:
        nonlocal turn
        for _ in range(times):
            packed[turn % len(packed)](x, work)
            turn += 1

    return call


def _paged(config: MoRConfig, rows: list[int]) -> Iterator[list[Case]]:
    """One query for each row over a context in pages, as a tick of decoding has."""
    heads, keys, width = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    if width not in native.HEAD_DIMS:
        return
    cases = []
    for count in rows:
        pages = CONTEXT // _PAGE
        entries, values = (torch.randn(count * CONTEXT, keys, width) for _ in range(2))
        table = torch.arange(count * pages).view(count, 1, pages)
        row, last = torch.arange(count), torch.full((count,), CONTEXT - 1)
        batch = native.Ragged(
            entries, values, table, _PAGE, row, last, last, row, torch.ones_like(row)
        )
        query = torch.randn(count, heads, width)
        cases.append(
            Case(
                "attention",
                f"pages, {CONTEXT} tokens",
                count,
                4.0 * width * heads * count * CONTEXT,
                2 * entries.nbytes,
                _repeated(native.paged_attention, query, None, None, batch, 0),
            )
        )
    yield cases


def _training(config: MoRConfig, shapes: tuple[tuple[int, int], ...]) -> Iterator[list[Case]]:
    """Causal attention of whole rows, forward and both ways; FLOPs of the causal half."""
    heads, keys, width = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    for rows, length in shapes:
        parts = [torch.randn(rows * length, h, width) for h in (heads, keys, keys)]
        inputs = [part.requires_grad_() for part in parts]
        pieces = native.Pieces.of_rows(rows, length, length)
        flops = 4.0 * width * heads * rows * length * (length + 1) / 2
        forward = _repeated(native.FlashAttention.apply, *inputs, pieces)
        both = _repeated(_both_ways, inputs, pieces, torch.randn(rows * length, heads, width))
        name = f"training, {rows} x {length}"
        yield [
            Case("attention", name + ", forward", rows * length, flops, 0, forward),
            Case("attention", name + ", both ways", rows * length, 3 * flops, 0, both),
        ]


def _both_ways(inputs: list[Tensor], pieces: native.Pieces, direction: Tensor) -> None:
    with torch.enable_grad():
        found = native.FlashAttention.apply(*inputs, pieces)
        torch.autograd.grad(found, inputs, direction)


def _repeated(function: Callable[..., object], *arguments: object) -> Callable[[int], object]:
    def call(times: int) -> None:
        for _ in range(times):
            function(*arguments)

    return call
