"""Many devices: FSDP2 around the shared block, what the Trainer has to know about it, checks.

DDP is Accelerate's and needs nothing but two switches. FSDP2 (``torch.distributed.fsdp``) is laid
around the network here and not by Accelerate, for three reasons: a block that runs R times must be
gathered once and kept, not R times; Accelerate shards on GPUs only, so that nothing of it could be
tested on a CPU; and its checkpoints do not load without it.

Units are the layers, private and shared, each gathered by its own forward; embedding, head, final
norm and router belong to the root and are gathered when the step begins. A shared layer is one unit
however often it runs: its gradient is complete after the backward of its first use, and is reduced
once.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from transformers import Trainer

from mor.config import MoRConfig
from mor.errors import MorError
from mor.hf.modeling import MoRForCausalLM
from mor.ops.ranks import world_size
from mor.train.recipe.recipe import Recipe
from mor.train.state import sharded


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
    """Whether a parameter may get no gradient, which DDP has to be told beforehand.

    The additive update has no gate, so that scores may reach no loss; a fixed depth below R may
    leave out shared layers. A depth without a token on one rank is no such case:
    :func:`mor.ops.compaction.nobody` runs there.
    """
    return config.update_rule == "additive" or config.router_fixed_depth is not None


# Sharding -----------------------------------------------------------------------------------------


def shard(
    model: MoRForCausalLM, device: torch.device, *, regather: bool, dtype: str = "float32"
) -> None:
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
    whole = MixedPrecisionPolicy(cast_forward_inputs=False)
    fully_shard(model, mesh=mesh, reshard_after_forward=False, mp_policy=whole)
    root: Any = model
    inner.router.run_every_depth()
    if not regather:
        root.set_reshard_after_backward(False)
        # Accelerate looks for this name when it accumulates gradients. Without it every micro-batch
        # reduces its own, and no gradient stays whole: what short memory wants.
        root.no_sync = partial(_no_sync, root)


@contextmanager
def _no_sync(model: FSDPModule) -> Iterator[None]:
    model.set_requires_gradient_sync(False)
    try:
        yield
    finally:
        model.set_requires_gradient_sync(True)


def eval_batch_size(sequences: int, limit: int) -> int:
    """Sequences per device so that every rank's last evaluation batch is whole, at most ``limit``.

    Accelerate fills up a last batch that is not with sequences from the front, and the Trainer
    gives each sequence the mean of its batch: the score would depend on the number of ranks.
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


class RanksTrainer(Trainer):
    """Trainer that trains a model from :func:`shard`, and goes on at any number of ranks."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if is_sharded(self.model):
            # Autocast and no more: no DDP around what FSDP reduces.
            prepare = self.accelerator.prepare_model
            self.accelerator.prepare_model = partial(prepare, evaluation_mode=True)

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """As ever; after a step's last micro-batch, clipping and optimiser meet shards."""
        loss = super().training_step(*args, **kwargs)
        if is_sharded(self.model) and self.accelerator.sync_gradients:
            release(self.model)
        return loss

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As ever; what it gathered is let go."""
        scores = super().evaluate(*args, **kwargs)
        if is_sharded(self.model):
            release(self.model)
        return scores

    lr_scheduler: Any

    @property
    def _network(self) -> nn.Module:
        assert isinstance(self.model, nn.Module)
        return self.model

    @property
    def _plain_optimizer(self) -> Any:
        return getattr(self.optimizer, "optimizer", self.optimizer)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """A checkpoint gets shards; whoever else asks gets one safetensors file. All ranks call."""
        if not is_sharded(self.model):
            super().save_model(output_dir, _internal_call)
            return
        out = Path(output_dir or str(self.args.output_dir))
        if _internal_call:
            sharded.save_shards(self.model, out)
        else:
            sharded.save_whole(self.model, out)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not is_sharded(self.model):
            super()._save_optimizer_and_scheduler(output_dir)
            return
        sharded.save_optimizer(self._network, self._plain_optimizer, Path(output_dir))
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / "scheduler.pt")

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        """Weights from either kind of checkpoint into either kind of model."""
        checkpoint = Path(resume_from_checkpoint)
        if is_sharded(self.model) or sharded.has_shards(checkpoint):
            sharded.load_weights(self._network, checkpoint)
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None or not (
            is_sharded(self.model) or sharded.has_shards(Path(checkpoint))
        ):
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        sharded.load_optimizer(self._network, self._plain_optimizer, Path(checkpoint))
        schedule = torch.load(Path(checkpoint) / "scheduler.pt", weights_only=True)
        self.lr_scheduler.load_state_dict(schedule)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """A rank that was not there takes the first one's: nothing of ours draws per rank."""
        number = self.args.process_index
        name = f"rng_state_{number}.pth" if self.args.world_size > 1 else "rng_state.pth"
        if checkpoint is None or (Path(checkpoint) / name).is_file():
            super()._load_rng_state(checkpoint)
            return
        sharded.load_first_random_state(Path(checkpoint))
