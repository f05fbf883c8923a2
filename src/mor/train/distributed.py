"""Many devices: DDP, FSDP2 around the shared block, and checks.

Both are torch's own. FSDP2 (``torch.distributed.fsdp``) is laid around the layers so that a block
that runs R times is gathered once and kept, not R times.

Units are the layers, private and shared, each gathered by its own forward; embedding, head, final
norm and router belong to the root and are gathered when the step begins. A shared layer is one unit
however often it runs: its gradient is complete after the backward of its first use, and is reduced
once.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from mor.config import MoRConfig
from mor.errors import MorError
from mor.ops.ranks import world_size
from mor.train.recipe.recipe import Recipe

_PATIENCE = timedelta(minutes=30)  # of a rank that waits for the others, as while one saves


def rank() -> int:
    """Number of this process among those that train along, from 0."""
    return int(os.environ.get("RANK", "0"))


def local_rank() -> int:
    """Number of this process on its node, from 0."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def join_ranks() -> torch.device:
    """Meet the other processes, where there are any, and take this one's device.

    Returns:
        The GPU of this rank, or the CPU.
    """
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", local_rank())
        torch.cuda.set_device(device)
    if world_size() > 1 and not dist.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=_PATIENCE)
    return device


@contextmanager
def first_process_first(*, of_node: bool = False) -> Iterator[None]:
    """Let the first process do something before the others do it too.

    Args:
        of_node: the first of every node goes first, not the first of all.
    """
    waits = (local_rank() if of_node else rank()) > 0
    several = world_size() > 1
    if several and waits:
        dist.barrier()
    try:
        yield
    finally:
        if several and not waits:
            dist.barrier()


def check_parallel(recipe: Recipe) -> None:
    """Refuse FSDP where there is nothing to shard over.

    Raises:
        MorError: ``train.parallel=fsdp`` with one process.
    """
    if recipe.train.parallel == "fsdp" and world_size() == 1:
        raise MorError(
            "train.parallel='fsdp' shards over several processes and there is one; start it with "
            "torchrun --nproc-per-node N -m mor.cli train ..., or set train.parallel=ddp"
        )


def check_ranks(recipe: Recipe, checkpoint: Path) -> None:
    """Refuse to go on with another number of sequences per step than the checkpoint's ranks had.

    Raises:
        MorError: the global batch would change with the number of processes.
    """
    section, here = recipe.train, world_size()
    before = len(list(checkpoint.glob("rng_state*.pth")))
    if section.global_batch_size is None and before not in (0, here):
        each = section.batch_size * section.gradient_accumulation_steps
        raise MorError(
            f"{checkpoint} was written by {before} process(es), {before * each} sequences a step; "
            f"{here} with train.batch_size={section.batch_size} would make it {here * each}: start "
            f"{before}, or begin runs with train.global_batch_size, which fits any number"
        )


def leaves_unused(config: MoRConfig) -> bool:
    """Whether a parameter may get no gradient, which DDP has to know beforehand.

    The additive update has no gate, so that scores may reach no loss; a fixed depth below R may
    leave out shared layers. A depth without a token on one rank is no such case:
    :func:`mor.ops.compaction.nobody` runs there.
    """
    return config.update_rule == "additive" or config.router_fixed_depth is not None


# Sharding -----------------------------------------------------------------------------------------


def shard(model: Any, device: torch.device, *, regather: bool, dtype: str = "float32") -> None:
    """Shard parameters, gradients and optimiser state of ``model`` over all ranks, in place.

    Every rank has to hold the same weights, and all ranks have to run the same passes afterwards.

    Args:
        model: on any device; moved to ``device``.
        device: of this rank.
        regather: False: every weight is gathered once per optimiser step, stays for all recursions,
            forward, backward and micro-batches, and is let go by :func:`release`. True: a layer is
            gathered for each pass through it and let go after it, so that one layer is whole at
            a time; each of the R recursions then gathers the block anew, forward and backward, and
            every micro-batch reduces its gradients.
        dtype: ``bfloat16`` gathers layers in bfloat16, in which autocast would use them anyway;
            root, gradients and sums stay float32.
    """
    if device.type == "cuda":
        torch.cuda.set_device(device)
    # Outputs are views here and nobody changes them in place.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    narrow = torch.bfloat16 if dtype == "bfloat16" else None
    policy = MixedPrecisionPolicy(narrow, torch.float32, cast_forward_inputs=False)
    inner = model.model
    for layer in (*inner.prelude_layers, *inner.block, *inner.coda_layers):
        fully_shard(layer, mesh=mesh, reshard_after_forward=regather, mp_policy=policy)
        register_fsdp_forward_method(layer, "enter_kv")  # of `kv_sharing="propagate"`
    whole = MixedPrecisionPolicy(cast_forward_inputs=False)
    fully_shard(model, mesh=mesh, reshard_after_forward=False, mp_policy=whole)
    root: Any = model
    inner.router.run_every_depth()
    if not regather:
        root.set_reshard_after_backward(False)


class Parallel:
    """A model on this rank's device, and what its gradients have to do with the other ranks'.

    Args:
        model: plain, or sharded already (:func:`shard`).
        device: of this rank.
        find_unused: DDP looks for parameters without a gradient, at some cost
            (:func:`leaves_unused`).
        regather: as for :func:`shard`.

    Attributes:
        plain: the model itself: for evaluation, saving and loading.
        model: what training calls: the model, or DDP around it.
    """

    def __init__(
        self,
        model: nn.Module,
        device: torch.device,
        *,
        find_unused: bool = False,
        regather: bool = False,
    ) -> None:
        self.device, self.regather = device, regather
        self.sharded = is_sharded(model)
        self.plain = model if self.sharded else model.to(device)
        self.model: nn.Module = self.plain
        self.ranks = world_size()
        if self.ranks > 1 and not self.sharded:
            devices = [device] if device.type == "cuda" else None
            self.model = DistributedDataParallel(
                self.plain, device_ids=devices, find_unused_parameters=find_unused
            )

    @contextmanager
    def accumulating(self, *, last: bool) -> Iterator[None]:
        """Around forward and backward of a micro-batch: gradients are exchanged after the last.

        With ``regather`` every micro-batch exchanges its own, so that no gradient stays whole.
        """
        with self._no_exchange() if not last else nullcontext():
            yield

    def _no_exchange(self) -> AbstractContextManager[None]:
        if isinstance(self.model, DistributedDataParallel):
            return self.model.no_sync()
        if isinstance(self.model, FSDPModule) and not self.regather:
            return _no_gradient_sync(self.model)
        return nullcontext()

    def release(self) -> None:
        """Let go of gathered weights, before clipping and the optimiser, which work on shards."""
        if self.sharded:
            release(self.plain)

    def mean(self, value: torch.Tensor) -> torch.Tensor:
        """Mean of a scalar over all ranks."""
        if self.ranks > 1:
            value = value.clone()
            dist.all_reduce(value)
            value = value / self.ranks
        return value

    def sum(self, value: torch.Tensor) -> torch.Tensor:
        """Sum of a scalar over all ranks."""
        if self.ranks > 1:
            value = value.clone()
            dist.all_reduce(value)
        return value


@contextmanager
def _no_gradient_sync(model: FSDPModule) -> Iterator[None]:
    model.set_requires_gradient_sync(False)
    try:
        yield
    finally:
        model.set_requires_gradient_sync(True)


def eval_batch_size(sequences: int, limit: int) -> int:
    """Sequences per device so that every rank's last evaluation batch is whole, at most ``limit``.

    Each sequence counts with the mean of its batch: of batches that differ in size from rank to
    rank, the score would depend on the number of ranks.
    """
    ranks = world_size()
    sizes = range(limit, 0, -1)
    return next((n for n in sizes if sequences % (n * ranks) == 0), 1) if ranks > 1 else limit


def is_sharded(model: Any) -> bool:
    """Whether :func:`shard` was here."""
    return isinstance(model, FSDPModule)


def release(model: Any) -> None:
    """Let go of all gathered weights; what is left are the shards that the optimiser changes."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def all_finite(model: nn.Module) -> bool:
    """Whether every weight on every rank is a finite number; all ranks get the same answer."""
    flags = [_local(p).isfinite().all() for p in model.parameters()]
    finite = torch.stack(flags).all().float()
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(finite, dist.ReduceOp.MIN)
    return bool(finite)


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor.detach()
