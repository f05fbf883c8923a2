"""Model FLOPs utilisation: FLOPs that the model needs, over what the devices could do.

    mfu = model FLOPs per second / (devices x peak FLOPs per second of one)

Model FLOPs are those of :mod:`mor.model.flops`: forward and backward of the tokens that run each
depth, nothing for the second forward of gradient checkpointing and nothing for padding (arXiv
2204.02311, appendix B). Peaks are dense rates, without structured sparsity.
"""

from __future__ import annotations

import functools
import re
import time
from collections.abc import Callable, Mapping

import torch

from mor.config import MoRConfig
from mor.model.flops import flops_per_token

# TFLOPs per second of (bfloat16 tensor cores with float32 sums, TF32 tensor cores, float32 without
# them), dense. From the vendors' datasheets, where figures "with sparsity" are twice these:
# nvidia.com/en-us/data-center/{a100,h100,h200,a10,a40,a30,l4,l40s}, resources.nvidia.com HGX B200,
# the architecture papers of Ampere GA102, Ada and RTX Blackwell for GeForce and RTX, and
# amd.com/en/products/accelerators/instinct/mi300/mi300x. The first name that fits counts. Only the
# bfloat16 rates of A100, B200, H100 and H200 were looked up again when this was written; for a
# figure that matters, set train.peak_flops.
_TFLOPS: tuple[tuple[str, float, float, float], ...] = (
    (r"\bB200\b", 2250.0, 1125.0, 75.0),
    (r"\bH200 NVL\b|\bH100 NVL\b", 835.5, 417.5, 60.0),
    (r"\bH100 PCIe\b", 756.0, 378.0, 51.0),
    (r"\bH100\b|\bH200\b|\bGH200\b", 989.4, 494.7, 66.9),
    (r"\bA100\b", 312.0, 156.0, 19.5),
    (r"\bA40\b", 149.7, 74.8, 37.4),
    (r"\bA30\b", 165.0, 82.0, 10.3),
    (r"\bA10\b", 125.0, 62.5, 31.2),
    (r"\bL40S\b", 362.0, 183.0, 91.6),
    (r"\bL4\b", 121.0, 60.0, 30.3),
    (r"\bRTX 5090\b", 209.5, 104.8, 104.8),
    (r"\bRTX 4090\b", 165.2, 82.6, 82.6),
    (r"\bRTX 3090\b(?! Ti)", 71.0, 35.6, 35.6),
    (r"\bRTX A6000\b", 154.8, 77.4, 38.7),
    (r"\bMI300X\b", 1307.4, 653.7, 163.4),
)


def peak_of(name: str, dtype: torch.dtype, tf32: bool = False) -> float | None:
    """Peak FLOPs per second of the GPU called ``name``; None for one that the table lacks.

    Args:
        name: as ``torch.cuda.get_device_name()`` gives it.
        dtype: bfloat16 or float32, of the matrix products.
        tf32: whether float32 products go to the tensor cores.
    """
    column = 1 if dtype == torch.bfloat16 else 2 if tf32 else 3
    for row in _TFLOPS:
        if re.search(row[0], name):
            return float(row[column]) * 1e12
    return None


@functools.cache
def measured_peak(dtype: torch.dtype, threads: int, seconds: float = 0.15) -> float:
    """FLOPs per second of the fastest of some square matrix products on the CPU, per process.

    Args:
        dtype: of the matrices.
        threads: how many torch uses; another number is measured anew.
        seconds: to spend; at least three products are timed.
    """
    width = 768
    left, right = (torch.ones(width, width, dtype=dtype) for _ in range(2))
    began, fastest, rounds = time.perf_counter(), float("inf"), 0
    while rounds < 3 or time.perf_counter() - began < seconds:
        start = time.perf_counter()
        torch.mm(left, right)
        fastest = min(fastest, time.perf_counter() - start)
        rounds += 1
    return 2.0 * width**3 / fastest


def peak_flops(dtype: torch.dtype) -> float | None:
    """Peak of one device of this process: the GPU's by its name, else what the CPU was measured at.

    None for a GPU that the table does not know: ``train.peak_flops`` of the recipe says it then.
    """
    if not torch.cuda.is_available():
        return measured_peak(dtype, torch.get_num_threads())
    tf32 = torch.backends.cuda.matmul.fp32_precision == "tf32"
    return peak_of(torch.cuda.get_device_name(), dtype, tf32)


class FlopsMeter:
    """Adds up the model FLOPs of a session and divides them by its time.

    A router whose load decides how deep tokens go (token choice) is counted by the shares that were
    measured, where the log has them; all others do what was planned.

    Args:
        config: the model's.
        seq_len: tokens per sequence.
        tokens_per_step: over all devices.
        planned: FLOPs of the first n optimiser steps of the run.
        peak: of all devices together, per second; None if not known.
    """

    def __init__(
        self,
        config: MoRConfig,
        seq_len: int,
        tokens_per_step: int,
        planned: Callable[[int], float],
        peak: float | None,
    ) -> None:
        self.config, self.seq_len, self.tokens_per_step = config, seq_len, tokens_per_step
        self.planned, self.peak = planned, peak
        self.total = 0.0
        self.last: int | None = None

    def read(
        self, step: int, steps_run: int, seconds: float, metrics: Mapping[str, float]
    ) -> dict[str, float]:
        """``flops_per_s`` and, where the peak is known, ``mfu``: means over this session.

        Args:
            step: optimiser steps of the run so far.
            steps_run: those of this session.
            seconds: that this session spent in training.
            metrics: of the router, from the newest batch.
        """
        last = step - steps_run if self.last is None else self.last
        self.total += self._between(last, step, metrics)
        self.last = step
        rate = self.total / max(1e-9, seconds)
        return {"flops_per_s": rate} | ({} if not self.peak else {"mfu": rate / self.peak})

    def _between(self, first: int, last: int, metrics: Mapping[str, float]) -> float:
        names = [f"router/active_fraction/{d}" for d in range(self.config.num_recursions)]
        if self.config.router != "token_choice" or not all(name in metrics for name in names):
            return self.planned(last) - self.planned(first)
        active = [metrics[name] for name in names]
        one = flops_per_token(self.config, self.seq_len, active).training
        return (last - first) * self.tokens_per_step * one
