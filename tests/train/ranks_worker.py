"""Runs of one, two and four gloo processes, for ``test_ranks.py`` to compare.

    python -m tests.train.ranks_worker FOLDER

Importing torch and transformers takes seconds, training these models takes tenths. So one process
imports, then forks the ranks of each phase; within a phase each rank does all jobs one after the
other. A rank that fails takes the others of its phase with it.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import sys
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from mor.model import recursion
from mor.model.network import find_router
from mor.train import train
from mor.train.loop import Loop
from tests.tiny import prepare_tiny, tiny_recipe

STEPS, SAVED = 4, 2
# Name of a setting: router, fields of the model, fields of the training section.
SETTINGS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "expert_choice": ("expert_choice", {"router_z_loss_coef": 0.01}, {}),
    "threshold": ("threshold", {"router_capacity_warmup_steps": 2}, {}),
    "token_choice": ("token_choice", {"router_z_loss_coef": 0.01}, {}),
    "random": ("random", {}, {}),
    "fixed": ("fixed", {}, {}),
    # An auxiliary router, norms apart, a head of its own, keys and values of depth 0 alone.
    "apart": (
        "expert_choice",
        {
            "router_objective": "aux_router",
            "share_norms": False,
            "tie_word_embeddings": False,
            "kv_sharing": "recursive",
        },
        {},
    ),
    # So few tokens go deep that some ranks have none, at depth 0 already. With so few, one token
    # more or less is seen: the seed is one where none of them ties with another at the boundary
    # (equal first tokens of two rows do, and rounding then decides).
    "sparse": (
        "threshold",
        {
            "router_capacities": [0.1, 0.06, 0.04],
            "router_z_loss_coef": 0.05,
            "initializer_range": 0.1,
        },
        {"seed": 3},
    ),
    # Scores reach no loss: parameters without a gradient.
    "unused": (
        "token_choice",
        {
            "router_balancing": "loss_free",
            "update_rule": "additive",
            "router_bias_update_rate": 3e-5,
        },
        {},
    ),
    "propagate": ("threshold", {"kv_sharing": "propagate"}, {}),
    "accumulate": ("threshold", {}, {"gradient_accumulation_steps": 2}),
    "narrow": ("expert_choice", {}, {"dtype": "bfloat16"}),
    # Steps of one recursion, then of three: what only deeper ones use has no gradient at first.
    "capped": (
        "expert_choice",
        {"relaxation": "lora", "relaxation_rank": 2},
        {"depth_schedule": [[0.5, 1], [0.5, 3]]},
    ),
    "checkpointing": ("token_choice", {}, {"gradient_checkpointing": True}),
    # Three groups of parameters, a warm-up that ends after the checkpoint.
    "long": (
        "expert_choice",
        {"router_objective": "aux_router", "router_capacity_warmup_steps": 3},
        {"global_batch_size": 4, "save_steps": SAVED, "save_total_limit": 9},
    ),
}
MODES: dict[str, dict[str, Any]] = {
    "ddp": {"parallel": "ddp"},
    "fsdp": {"parallel": "fsdp"},
    "regather": {"parallel": "fsdp", "fsdp_regather": True},
}


@dataclass(frozen=True)
class Job:
    """One run; with ``after``, the rest of the run of that name from its checkpoint on."""

    setting: str
    world: int
    mode: str = "ddp"
    after: str | None = None

    @property
    def name(self) -> str:
        rest = f"-after-{self.after}" if self.after else ""
        return f"{self.setting}-{self.mode}-{self.world}{rest}"


PHASES: list[list[Job]] = [
    [Job(setting, 1) for setting in SETTINGS],
    [
        Job("expert_choice", 2, "ddp"),
        Job("threshold", 2, "fsdp"),
        Job("token_choice", 2, "ddp"),
        Job("random", 2, "ddp"),
        Job("fixed", 2, "fsdp"),
        Job("threshold", 2, "regather"),
        Job("apart", 2, "ddp"),
        Job("apart", 2, "fsdp"),
        Job("sparse", 2, "ddp"),
        Job("unused", 2, "ddp"),
        Job("unused", 2, "fsdp"),
        Job("propagate", 2, "ddp"),
        Job("propagate", 2, "fsdp"),
        Job("propagate", 2, "regather"),
        Job("accumulate", 2, "ddp"),
        Job("accumulate", 2, "fsdp"),
        Job("accumulate", 2, "regather"),
        Job("narrow", 2, "ddp"),
        Job("narrow", 2, "fsdp"),
        Job("capped", 2, "ddp"),
        Job("capped", 2, "fsdp"),
        Job("checkpointing", 2, "regather"),
        Job("long", 2, "fsdp"),
        Job("long", 2, "fsdp", after="long-ddp-1"),
    ],
    [
        Job("expert_choice", 4, "fsdp"),
        Job("threshold", 4, "ddp"),
        Job("token_choice", 4, "regather"),
        Job("random", 4, "fsdp"),
        Job("sparse", 4, "regather"),
        Job("sparse", 4, "fsdp"),
        Job("long", 4, "fsdp"),
        Job("long", 4, "fsdp", after="long-fsdp-2"),
    ],
    [Job("long", 1, after="long-fsdp-2"), Job("long", 1, after="long-fsdp-4")],
    [Job("long", 2, "ddp", after="long-fsdp-4")],
]


def run_folder(root: Path, job: Job) -> Path:
    return root / job.name / "tiny"


def prepare_rest(root: Path, job: Job) -> None:
    """What a kill after the checkpoint would have left of ``job.after``."""
    folder = run_folder(root, job)
    shutil.copytree(root / str(job.after) / "tiny", folder)
    shutil.rmtree(folder / "model")
    (folder / "summary.json").unlink()
    shutil.rmtree(folder / "checkpoints" / f"checkpoint-{STEPS}")


def work(root: Path, rank: int, phase: list[Job]) -> None:
    """All jobs of a phase on one rank; leaves NAME.RANK.json beside each run."""
    seen: dict[str, Any] = {}
    plain_run, nobody = Loop.run, recursion.nobody

    def watched(self: Loop) -> None:
        plain_run(self)
        model: Any = self.parallel.plain
        buffers = find_router(model).named_buffers()
        seen["buffers"] = {name: tensor.tolist() for name, tensor in buffers}
        head = model.get_output_embeddings().weight
        seen["tied"] = model.get_input_embeddings().weight is head
        seen["sharded"] = [isinstance(p, DTensor) for p in model.parameters()]
        seen["held"] = sum(
            (p.to_local() if isinstance(p, DTensor) else p).numel() for p in model.parameters()
        )
        seen["parameters"] = sum(p.numel() for p in model.parameters())

    def counted(*args: Any, **kwargs: Any) -> Any:
        seen["nobody"] += 1
        return nobody(*args, **kwargs)

    def counting(inner: Any, kind: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            seen[kind] += stepping[0]
            return inner(*args, **kwargs)

        return call

    def step(self: Loop, *args: Any, **kwargs: Any) -> Any:
        stepping[0] = 1
        plain_step(self, *args, **kwargs)
        stepping[0] = 0

    stepping, plain_step = [0], Loop.learn_micro_batch
    Loop.run, recursion.nobody = watched, counted  # type: ignore[method-assign]
    Loop.learn_micro_batch = step  # type: ignore[method-assign]
    # What FSDP2 calls, in older and newer torch.
    for kind in ("all_gather", "reduce_scatter"):
        for name in (f"{kind}_single", f"{kind}_into_tensor", f"{kind}_tensor"):
            if hasattr(dist, name):
                setattr(dist, name, counting(getattr(dist, name), kind))
    for job in phase:
        seen.clear()
        seen.update({"nobody": 0, "all_gather": 0, "reduce_scatter": 0})
        router, model, fields = SETTINGS[job.setting]
        common = {
            "batch_size": 4 // job.world,
            "budget": {"steps": STEPS},
            "gradient_accumulation_steps": 1,
            "adam_epsilon": 1e-3,  # else rounding decides the direction of what hardly moves
            "eval_sequences": 6,
            "threads": 1,
        }
        fields = common | fields | MODES[job.mode]
        recipe = tiny_recipe(root / "data", root / job.name, router, model, **fields)
        train(recipe, resume=job.after is not None)
        (root / f"{job.name}.{rank}.json").write_text(json.dumps(seen))


def fork_ranks(root: Path, phase: list[Job]) -> None:
    """Run a phase; raise when a rank fails."""
    world = phase[0].world
    with socket.socket() as found:
        found.bind(("localhost", 0))
        port = str(found.getsockname()[1])
    for job in phase:
        if job.after is not None:
            prepare_rest(root, job)
    ranks = []
    for rank in range(world):
        pid = os.fork()
        if pid == 0:
            if world > 1:
                names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
                values = (str(rank), str(rank), str(world), "localhost", port)
                os.environ.update(zip(names, values, strict=True))
            try:
                work(root, rank, phase)
            except BaseException:
                traceback.print_exc()
                sys.stderr.flush()
                os._exit(1)
            os._exit(0)
        ranks.append(pid)
    while ranks:
        pid, status = os.wait()
        ranks.remove(pid)
        if status:
            for other in ranks:
                os.kill(other, signal.SIGKILL)
            raise SystemExit(f"a rank of {world} failed")


if __name__ == "__main__":
    target = Path(sys.argv[1])
    torch.set_num_threads(1)
    prepare_tiny(target)
    for number, jobs in enumerate(PHASES):
        fork_ranks(target, jobs)
        print(f"phase {number}: {jobs[0].world} rank(s), {len(jobs)} jobs", flush=True)
