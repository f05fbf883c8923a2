"""What the log says about the steps of a run: losses, router metrics, speed, FLOPs, memory."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from mor.config import MoRConfig
from mor.model.metrics import batch_metrics
from mor.model.routers.base import Router
from mor.train.distributed import Parallel
from mor.train.objective import LossParts
from mor.train.plan.budget import PlannedFlops
from mor.train.plan.mfu import FlopsMeter, peak_flops


def peak_memory_bytes() -> int | None:
    """Peak memory so far: of the GPU where there is one, else of this process; None if unknown."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


class Meter:
    """Collects the parts of the loss between two log entries, and times training.

    The clock of ``tokens_per_s`` counts data, forward, backward and optimiser; evaluation and
    saving pause it.

    Args:
        config: of the model.
        flops: what the steps of the run cost, as planned.
        parallel: the ranks, over which losses are averaged.
        accumulation: micro-batches per optimiser step.
        dtype: of the matrix products: ``float32`` or ``bfloat16``.
        peak: FLOPs per second and device; default that of the GPU by its name, or of the CPU as
            measured.

    Attributes:
        loss: of this rank, added up since the last log entry.
    """

    def __init__(
        self,
        config: MoRConfig,
        flops: PlannedFlops,
        parallel: Parallel,
        *,
        accumulation: int = 1,
        dtype: str = "float32",
        peak: float | None = None,
    ) -> None:
        self.config, self.flops, self.parallel = config, flops, parallel
        self.accumulation, self.dtype, self.peak = accumulation, dtype, peak
        self._began: float | None = None
        self._elapsed_before = self._cpu_before = self._paused = 0.0
        self._micro_batches = 0
        self._since_log = 0
        self._utilisation: FlopsMeter | None = None
        self._clear()

    def _clear(self) -> None:
        self.loss = torch.tensor(0.0, device=self.parallel.device)
        self._shares: dict[str, list[Tensor]] = {}
        self._means: dict[str, list[Tensor]] = {}
        self._metrics: dict[str, float] = {}
        self._since_log = 0

    def begin(self, elapsed_s: float | None, cpu_s: float | None) -> None:
        """Go on counting from what an earlier session had reached; None for a new run."""
        self._elapsed_before = elapsed_s or 0.0
        self._cpu_before = cpu_s or 0.0

    def start(self) -> None:
        """Start the clock, at the first micro-batch; later calls change nothing."""
        if self._began is None:
            self._began = time.monotonic()
            self._cpu_before -= time.process_time()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Stop the clock of ``tokens_per_s`` while something else than training runs."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # what is still queued is training
        began = time.monotonic()
        yield
        self._paused += time.monotonic() - began

    def add(self, loss: Tensor, parts: LossParts, router: Router | None) -> None:
        """Note a micro-batch for the next log entry.

        Args:
            loss: scalar that was back-propagated.
            parts: of the loss.
            router: for its metrics, where the step is logged.
        """
        self.loss = self.loss + loss
        self._micro_batches += 1
        self._since_log += 1
        for kept, terms in ((self._shares, parts.shares), (self._means, parts.means)):
            for name, term in terms.items():
                kept.setdefault(name, []).append(term.detach())
        if router is not None and parts.depths is not None:
            found = batch_metrics(router, parts.depths, parts.traces, parts.token_mask)
            self._metrics = {f"router/{name}": value for name, value in found.items()}

    def measure_loss(self) -> dict[str, float]:
        """The loss: mean over the steps since the last entry, and over ranks. All ranks ask."""
        steps = self._since_log // self.accumulation
        return {"loss": float(self.parallel.mean(self.loss)) / steps}

    def measure(self, step: int) -> dict[str, float]:
        """What else is known about the steps since the last log entry, which ends here.

        All ranks ask.

        Args:
            step: optimiser steps of the run so far.
        """
        # Micro-batches and ranks each hold their share of the terms that add up.
        shares = self.accumulation * self.parallel.ranks
        entry = {name: self._mean(terms) * shares for name, terms in self._shares.items()}
        entry |= {name: self._mean(terms) for name, terms in self._means.items()}
        entry |= self._metrics
        assert self._began is not None
        elapsed = time.monotonic() - self._began
        seconds = elapsed - self._paused
        steps_run = self._micro_batches // self.accumulation
        entry["elapsed_s"] = self._elapsed_before + elapsed
        entry["cpu_s"] = self._cpu_before + time.process_time()
        entry["tokens_per_s"] = steps_run * self.flops.tokens_per_step / max(1e-9, seconds)
        entry |= self._measure_utilisation(step, steps_run, seconds)
        memory = peak_memory_bytes()
        entry |= {} if memory is None else {"peak_memory_bytes": memory}
        self._clear()
        return entry

    def _mean(self, terms: list[Tensor]) -> float:
        return float(self.parallel.mean(torch.stack(terms).float().mean()))

    def _measure_utilisation(self, step: int, steps_run: int, seconds: float) -> dict[str, float]:
        if self._utilisation is None:
            dtype = torch.bfloat16 if self.dtype == "bfloat16" else torch.float32
            one = self.peak or peak_flops(dtype)
            peak = None if one is None else one * self.parallel.ranks
            flops = self.flops
            self._utilisation = FlopsMeter(
                self.config, flops.seq_len, flops.tokens_per_step, flops.until, peak
            )
        return self._utilisation.read(step, steps_run, seconds, self._metrics)

    def count(self, step: int) -> dict[str, float]:
        """Tokens seen and FLOPs spent by the first ``step`` optimiser steps of the run."""
        return {"tokens": step * self.flops.tokens_per_step, "flops": self.flops.until(step)}
