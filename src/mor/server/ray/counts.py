"""How many replicas there are, and what share of the machine each gets."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from mor.errors import MorError

UPSCALE, DOWNSCALE = 10.0, 120.0


@dataclass(frozen=True)
class Count:
    """Replicas: at least, at the start, at most.

    Attributes:
        least, most: bounds; equal where the number is fixed.
        start: between them.
        up, down: seconds of more, or less, load before one starts, or goes.
    """

    least: int
    start: int
    most: int
    up: float = UPSCALE
    down: float = DOWNSCALE

    @property
    def fixed(self) -> bool:
        """Whether the number never changes."""
        return self.least == self.most


@dataclass(frozen=True)
class Share:
    """What one replica gets: CPU cores, which are its threads, and GPUs."""

    cores: int
    gpus: int = 0


def parse_count(
    replicas: int | None, autoscale: str | None, up: float = UPSCALE, down: float = DOWNSCALE
) -> Count | None:
    """What ``--replicas`` and ``--autoscale`` say; None where neither was given.

    Args:
        replicas: a number; with ``autoscale``, how many there are at the start.
        autoscale: ``MIN:MAX``.
        up, down: see :class:`Count`.

    Raises:
        MorError: no number above 0, no range, or a start outside the range.
    """
    if replicas is not None and replicas < 1:
        raise MorError(f"replicas={replicas} must be at least 1")
    if autoscale is None:
        return None if replicas is None else Count(replicas, replicas, replicas)
    found = re.fullmatch(r"([0-9]{1,6}):([0-9]{1,6})", autoscale)
    if found is None:
        raise MorError(f"autoscale={autoscale!r} must be MIN:MAX, two whole numbers such as 1:4")
    least, most = int(found[1]), int(found[2])
    if not 1 <= least <= most:
        raise MorError(f"autoscale={autoscale!r}: MIN must be at least 1, and MAX at least MIN")
    start = least if replicas is None else replicas
    if not least <= start <= most:
        raise MorError(f"replicas={start} is outside of autoscale={autoscale!r}")
    return Count(least, start, most, up, down)


def share_out(count: Count, cores: int, gpus: int) -> Share:
    """An equal share of one machine for each of the most replicas that there may be.

    Args:
        count: of replicas.
        cores: that this process may use.
        gpus: that this process sees.

    Raises:
        MorError: more replicas than cores, or than GPUs where there are any.
    """
    if gpus and count.most > gpus:
        raise MorError(
            f"replicas={count.most}: there are {gpus} GPUs, and each replica has one of its own; "
            f"give at most {gpus}, or set CUDA_VISIBLE_DEVICES= to serve on the CPU"
        )
    if count.most > cores:
        raise MorError(
            f"replicas={count.most}: this machine has {cores} cores, and each replica has at "
            f"least one of its own; give at most {cores}, or more machines (docs/replicas.md)"
        )
    return Share(cores // count.most, 1 if gpus else 0)


RAY_DEFAULTS = {
    # Replicas answer by gRPC and not through Ray's object store: fewer steps per token.
    "RAY_SERVE_USE_GRPC_BY_DEFAULT": "1",
    # By itself it looks at its replicas ten times a second: a twentieth of a core.
    "RAY_SERVE_CONTROL_LOOP_INTERVAL_S": "0.5",
    "RAY_SERVE_METRICS_EXPORT_INTERVAL_MS": "1000",
}
"""Environment variables of Ray Serve, as we want them."""


def set_ray_defaults() -> None:
    """Set :data:`RAY_DEFAULTS`; a user's value stays.

    Ray Serve reads them when it is imported: this comes before.
    """
    for name, value in RAY_DEFAULTS.items():
        os.environ.setdefault(name, value)


def count_cores() -> int:
    """CPU cores that this process may use."""
    usable = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None
    return len(usable) if usable is not None else os.cpu_count() or 1


def count_gpus() -> int:
    """GPUs that this process sees."""
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def share_memory(options: Mapping[str, Any], count: Count) -> dict[str, Any]:
    """Options of an engine, for several on one machine: each takes its part of the free memory."""
    fraction = options.get("memory_fraction")
    if fraction is None or options.get("num_pages") is not None or count_gpus():
        return dict(options)
    return {**options, "memory_fraction": fraction / count.most}
