"""What this machine can do, measured in the same run as the systems: the cost model's constants.

A linear layer is timed at the shapes of the models and at the row counts that passes have, over
copies of its weight that together are larger than the caches, as a model's layers are. The best of
all forms there are counts: torch's plain one, packed for MKL, packed for oneDNN (what the
compiler's freezing emits), and our own kernel; for weights of 8 bits torch's dynamic ones and ours.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mor.bench.device import read_clock
from mor.config import MoRConfig
from mor.errors import MorError
from mor.ops import native

Shape = tuple[int, int]  # inputs, outputs
ROTATED_BYTES = 200 << 20
MOST_COPIES = 160


@dataclass(frozen=True)
class Rates:
    """Measured constants of a machine.

    Attributes:
        seconds: of one linear layer, by shape and rows.
        forms: which form that was.
        read_bytes_per_s: how fast memory is read in one long stretch.
        threads: of torch.
        itemsize: bytes of a number in the cache of keys and values.
    """

    seconds: dict[Shape, dict[int, float]]
    forms: dict[Shape, dict[int, str]]
    read_bytes_per_s: float
    threads: int
    itemsize: int = 4

    def per_row(self, shape: Shape, most: int) -> float:
        """Seconds per row at the best of the measured row counts up to ``most``."""
        measured = self.seconds[shape]
        fitting = [rows for rows in measured if rows <= most] or [min(measured)]
        return min(measured[rows] / rows for rows in fitting)

    def at(self, shape: Shape, rows: float) -> float:
        """Seconds of a layer at ``rows``, between measured row counts linearly."""
        known = sorted(self.seconds[shape].items())
        if rows <= known[0][0]:
            return known[0][1]
        for (low, before), (high, after) in pairwise(known):
            if rows <= high:
                return before + (after - before) * (rows - low) / (high - low)
        return known[-1][1] * rows / known[-1][0]

    def better(self, other: Rates) -> Rates:
        """The best of both: what was disturbed in one measurement may not be in the other."""
        seconds: dict[Shape, dict[int, float]] = {}
        forms: dict[Shape, dict[int, str]] = {}
        for shape, by_rows in self.seconds.items():
            best = {
                rows: min(
                    (by_rows[rows], self.forms[shape][rows]),
                    (other.seconds[shape][rows], other.forms[shape][rows]),
                )
                for rows in by_rows
            }
            seconds[shape] = {rows: took for rows, (took, _) in best.items()}
            forms[shape] = {rows: form for rows, (_, form) in best.items()}
        read = max(self.read_bytes_per_s, other.read_bytes_per_s)
        return Rates(seconds, forms, read, self.threads, self.itemsize)

    def record(self) -> dict[str, object]:
        """GFLOP/s and form by shape and rows, as it goes into a record."""
        return {
            "read_gb_per_s": self.read_bytes_per_s / 1e9,
            "threads": self.threads,
            "linear_gflop_per_s": {
                f"{inputs}x{outputs}": {
                    str(rows): [
                        round(2 * rows * inputs * outputs / seconds / 1e9, 1),
                        self.forms[inputs, outputs][rows],
                    ]
                    for rows, seconds in by_rows.items()
                }
                for (inputs, outputs), by_rows in self.seconds.items()
            },
        }


def layer_shapes(config: MoRConfig) -> list[Shape]:
    """The matrix products of one layer, those of the same input as one."""
    queries = config.num_attention_heads * config.head_dim
    keys = config.num_key_value_heads * config.head_dim
    width, ffn = config.hidden_size, config.intermediate_size
    return [(width, queries + 2 * keys), (queries, width), (width, 2 * ffn), (ffn, width)]


def head_shape(config: MoRConfig) -> Shape:
    """[out, in] of the vocabulary projection."""
    return config.hidden_size, config.vocab_size


def measure_rates(
    configs: Iterable[MoRConfig],
    rows: Iterable[int],
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    *,
    int8: bool = False,
    seconds: float = 0.05,
    rotated_bytes: int = ROTATED_BYTES,
) -> Rates:
    """Time the shapes of ``configs`` at ``rows``.

    Args:
        configs: whose shapes.
        rows: row counts.
        device, dtype: of the models.
        int8: time weights of 8 bits instead, on the CPU.
        seconds: least time of one measurement; three are taken, and the best counts.
        rotated_bytes: of float32 weights that are gone through before one comes again.

    Raises:
        MorError: weights of 8 bits, and nothing here that multiplies them.
    """
    device = torch.device(device)
    shapes = {s for c in configs for s in (*layer_shapes(c), head_shape(c))}
    counts = sorted(set(rows))
    times: dict[Shape, dict[int, float]] = {}
    forms: dict[Shape, dict[int, str]] = {}
    with torch.inference_mode():
        for shape in sorted(shapes):
            inputs, outputs = shape
            size = inputs * outputs * dtype.itemsize
            copies = min(MOST_COPIES, max(1, math.ceil(rotated_bytes / size)))
            # Of numbers that bfloat16 holds, as the models' are (mor.bench.forced).
            weights = [
                torch.randn(outputs, inputs, device=device).bfloat16().to(dtype)
                for _ in range(copies)
            ]
            found: dict[int, list[tuple[float, str]]] = {count: [] for count in counts}
            for name, layer in _forms(weights, int8):
                for count in counts:
                    x = torch.randn(count, inputs, device=device, dtype=dtype)
                    found[count].append((_time(layer(x), copies, device, seconds), name))
            if not found[counts[0]]:
                raise MorError("there is no form of linear layers with 8-bit weights here")
            times[shape] = {count: min(found[count])[0] for count in counts}
            forms[shape] = {count: min(found[count])[1] for count in counts}
        read = _read_rate(device, 2 * rotated_bytes)
    return Rates(times, forms, read, torch.get_num_threads(), dtype.itemsize)


# From the rows to a call with the number of a copy.
Layer = Callable[[Tensor], Callable[[int], Tensor]]


def _forms(weights: list[Tensor], int8: bool) -> Iterator[tuple[str, Layer]]:
    """Each way to run the layer there is here, by name."""
    cpu = weights[0].device.type == "cpu" and weights[0].dtype == torch.float32
    if cpu and native.library() is not None:
        work = native.Workspace()
        own = [native.PackedLinear([w], [None], int8=int8) for w in weights]
        yield "own", lambda x: lambda i: own[i](x, work)
        del own
    if int8:
        if cpu:
            yield from _dynamic_forms(weights)
        return
    yield "plain", lambda x: lambda i: F.linear(x, weights[i])
    if cpu and torch.backends.mkl.is_available():
        yield "mkl", lambda x: _packed_for_mkl(weights, x)
    if cpu and torch.backends.mkldnn.is_available():
        yield "onednn", lambda x: _packed_for_onednn(weights, x)


def _packed_for_mkl(weights: list[Tensor], x: Tensor) -> Callable[[int], Tensor]:
    ops = torch.ops.mkl
    packed = [ops._mkl_reorder_linear_weight(w, len(x)) for w in weights]
    return lambda i: ops._mkl_linear(x, packed[i], weights[i], None, len(x))


def _packed_for_onednn(weights: list[Tensor], x: Tensor) -> Callable[[int], Tensor]:
    ops = torch.ops.mkldnn
    packed = [ops._reorder_linear_weight(w, len(x)) for w in weights]
    return lambda i: ops._linear_pointwise(x, packed[i], None, "none", [], "")


def _dynamic_forms(weights: list[Tensor]) -> Iterator[tuple[str, Layer]]:
    """torch's: a scale per output for the weights, one for all inputs, found at each call."""
    before = torch.backends.quantized.engine
    ops = torch.ops.quantized
    for engine in ("onednn", "fbgemm"):
        if engine not in torch.backends.quantized.supported_engines:
            continue
        torch.backends.quantized.engine = engine
        packed = []
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # deprecated in favour of what has no kernel yet
            for weight in weights:
                scale = (weight.abs().amax(1) / 127).double()
                zero = torch.zeros(len(weight), dtype=torch.long)
                quantized = torch.quantize_per_channel(weight, scale, zero, 0, torch.qint8)
                packed.append(ops.linear_prepack(quantized, None))
        torch.backends.quantized.engine = before
        yield engine, partial(_dynamic, packed)


def _dynamic(packed: list[Any], x: Tensor) -> Callable[[int], Tensor]:
    run = torch.ops.quantized.linear_dynamic
    return lambda i: run(x, packed[i], reduce_range=False)


def _time(
    call: Callable[[int], Tensor], copies: int, device: torch.device, seconds: float
) -> float:
    """Seconds of one call, the best of three stretches over all copies."""
    for i in range(min(copies, 3)):
        call(i)
    best, turn = math.inf, 0
    stretch = 64 if device.type == "cuda" else 8  # waiting for a GPU costs as much as calls do
    for _ in range(3):
        count, began = 0, read_clock(device)
        while True:
            for _ in range(stretch):
                call(turn % copies)
                turn += 1
            count += stretch
            spent = read_clock(device) - began
            if spent >= seconds:
                break
        best = min(best, spent / count)
    return best


def _read_rate(device: torch.device, size: int) -> float:
    """Bytes per second of summing one long vector."""
    vector = torch.ones(size // 4, device=device)
    best = math.inf
    for _ in range(4):
        began = read_clock(device)
        vector.sum()
        best = min(best, read_clock(device) - began)
    return size / best
