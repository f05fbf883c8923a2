"""What this machine can do, measured in the same run as the systems: the cost model's constants.

A linear layer is timed at the shapes of the models and at the row counts that passes have, over
copies of its weight that together are larger than the caches, as a model's layers are. The best of
the forms that torch has counts: plain, packed for MKL, packed for oneDNN (what the compiler's
freezing emits). So the rate is one that somebody could reach, not the one that we do.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from mor.config import MoRConfig

Shape = tuple[int, int]  # inputs, outputs
ROTATED_BYTES = 200 << 20
MOST_COPIES = 160


@dataclass(frozen=True)
class Rates:
    """Measured constants.

    Attributes:
        seconds: of one linear layer, by shape and rows.
        forms: which form that was.
        read_bytes_per_s: how fast memory is read in one long stretch.
        threads: of torch.
    """

    seconds: dict[Shape, dict[int, float]]
    forms: dict[Shape, dict[int, str]]
    read_bytes_per_s: float
    threads: int

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
    """The head's."""
    return config.hidden_size, config.vocab_size


def measure_rates(
    configs: Iterable[MoRConfig],
    rows: Iterable[int],
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    seconds: float = 0.05,
    rotated_bytes: int = ROTATED_BYTES,
) -> Rates:
    """Time the shapes of ``configs`` at ``rows``.

    Args:
        configs: whose shapes.
        rows: row counts.
        device, dtype: of the models.
        seconds: least time of one measurement; three are taken, and the best counts.
        rotated_bytes: of weights that are gone through before one comes again.
    """
    device = torch.device(device)
    shapes = {s for c in configs for s in (*layer_shapes(c), head_shape(c))}
    times: dict[Shape, dict[int, float]] = {}
    forms: dict[Shape, dict[int, str]] = {}
    with torch.inference_mode():
        for shape in sorted(shapes):
            times[shape], forms[shape] = {}, {}
            for count in sorted(set(rows)):
                best = min(
                    (_time(call, copies, device, seconds), name)
                    for name, call, copies in _forms(shape, count, device, dtype, rotated_bytes)
                )
                times[shape][count], forms[shape][count] = best
        read = _read_rate(device, 2 * rotated_bytes)
    return Rates(times, forms, read, torch.get_num_threads())


Form = tuple[str, Callable[[int], Tensor], int]


def _forms(
    shape: Shape, rows: int, device: torch.device, dtype: torch.dtype, rotated_bytes: int
) -> Iterable[Form]:
    """Each way to run the layer: its name, a call with the number of a copy, how many copies."""
    inputs, outputs = shape
    size = inputs * outputs * dtype.itemsize
    copies = min(MOST_COPIES, max(1, math.ceil(rotated_bytes / size)))
    weights = [torch.randn(outputs, inputs, device=device, dtype=dtype) for _ in range(copies)]
    x = torch.randn(rows, inputs, device=device, dtype=dtype)
    yield "plain", lambda i: F.linear(x, weights[i]), copies
    if device.type != "cpu" or dtype != torch.float32:
        return
    if torch.backends.mkl.is_available():
        ops = torch.ops.mkl
        mkl = [ops._mkl_reorder_linear_weight(w, rows) for w in weights]
        yield "mkl", lambda i: ops._mkl_linear(x, mkl[i], weights[i], None, rows), copies
        del mkl
    if torch.backends.mkldnn.is_available():
        dnn = torch.ops.mkldnn
        packed = [dnn._reorder_linear_weight(w, rows) for w in weights]
        yield "onednn", lambda i: dnn._linear_pointwise(x, packed[i], None, "none", [], ""), copies


def _time(
    call: Callable[[int], Tensor], copies: int, device: torch.device, seconds: float
) -> float:
    """Seconds of one call, the best of three stretches over all copies."""
    for i in range(min(copies, 3)):
        call(i)
    best, turn = math.inf, 0
    for _ in range(3):
        count, began = 0, _clock(device)
        while True:
            for _ in range(8):
                call(turn % copies)
                turn += 1
            count += 8
            spent = _clock(device) - began
            if spent >= seconds:
                break
        best = min(best, spent / count)
    return best


def _read_rate(device: torch.device, size: int) -> float:
    """Bytes per second of summing one long vector."""
    vector = torch.ones(size // 4, device=device)
    best = math.inf
    for _ in range(4):
        began = _clock(device)
        vector.sum()
        best = min(best, _clock(device) - began)
    return size / best


def _clock(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()
