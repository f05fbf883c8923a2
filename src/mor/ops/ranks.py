"""Several processes that train along ("ranks"): how many there are, and sums over all of them.

Where one process trains alone, each function gives that process's own answer. A collective must be
called by every rank, in the same order.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor


def world_size() -> int:
    """How many processes train along, as torchrun and SLURM's launchers say."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_distributed() -> bool:
    """Whether several ranks have met (``torch.distributed`` is initialised)."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def sum_over_ranks(*numbers: Tensor | int, like: Tensor) -> tuple[Tensor, ...]:
    """Each scalar summed over all ranks, as int64 on the device of ``like``; one message."""
    stacked = torch.stack([torch.as_tensor(n, device=like.device).long() for n in numbers])
    if is_distributed():
        torch.distributed.all_reduce(stacked)
    return tuple(stacked.unbind())


def all_reduce_mean(total: Tensor, count: Tensor) -> Tensor:
    """``total / count`` over all ranks; nan where nothing was counted."""
    both = torch.stack((total, count))
    if is_distributed():
        torch.distributed.all_reduce(both)
    return both[0] / both[1]


def any_rank(flag: bool, device: torch.device) -> bool:
    """Whether ``flag`` is set on any rank; every rank must ask."""
    if not is_distributed():
        return flag
    raised = torch.tensor(float(flag), device=device)
    torch.distributed.all_reduce(raised, torch.distributed.ReduceOp.MAX)
    return bool(raised)
