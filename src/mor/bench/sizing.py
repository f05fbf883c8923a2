"""How much a core or a GPU serves, and what a GiB holds: the cost model, before there is a machine.

Nothing here is measured. FLOPs and bytes of a token are counted exactly (:mod:`mor.model.flops`,
:mod:`mor.bench.bound`); a machine is two rates. A step over B sequences takes the longer of

    FLOPs of B tokens / FLOPs per second
    (weights, read once per pass over them, and the cached entries of B tokens) / bytes per second
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from mor.bench.bound import Work, flops, kv_bytes_read
from mor.config import MoRConfig
from mor.engine.entries import entry_bytes
from mor.model.flops import flops_per_token

GIB = 1 << 30


@dataclass(frozen=True)
class Machine:
    """One core or one GPU.

    Attributes:
        name: what tables call it.
        flops_per_s: that matrix products reach, not the data sheet's peak.
        bytes_per_s: of memory.
        itemsize: bytes per weight and per cached number.
    """

    name: str
    flops_per_s: float
    bytes_per_s: float
    itemsize: int


# A core: rates of one of two cores of a Xeon with AVX-512 at 32 rows. GPUs: half of the data
# sheets' dense bfloat16 peak, 80% of their bandwidth.
MACHINES = (
    Machine("core, float32", 65e9, 10e9, 4),
    Machine("A100, bfloat16", 156e12, 1.6e12, 2),
    Machine("H100, bfloat16", 495e12, 2.7e12, 2),
)


def bytes_per_token(
    config: MoRConfig, shares: Sequence[float], dtype: torch.dtype = torch.float32
) -> float:
    """Bytes that a token's keys and values take in pages, on average.

    Args:
        config: without KV sharing.
        shares: share of tokens that run each depth.
        dtype: of entries.
    """
    entry = entry_bytes(config.num_key_value_heads, config.head_dim, dtype)
    private = config.num_prelude_layers + config.num_coda_layers
    return entry * (private + config.num_recursion_layers * sum(shares))


def pages_per_gib(
    config: MoRConfig, page_size: int = 16, dtype: torch.dtype = torch.float32
) -> int:
    """Pages in a GiB; a page holds ``page_size`` tokens of one layer at one depth."""
    return GIB // (page_size * entry_bytes(config.num_key_value_heads, config.head_dim, dtype))


def weight_bytes(config: MoRConfig, itemsize: int) -> float:
    """Bytes of weights that one step reads: the shared block once for each recursion."""
    one = flops_per_token(config, 0, [1.0] * config.num_recursions)
    return one.forward / 2 * itemsize


def requests_per_second(
    config: MoRConfig,
    machine: Machine,
    shares: Sequence[float],
    prompt: int,
    new: int,
    batch: int,
) -> float:
    """Requests that a machine answers per second, ``batch`` of them under way.

    Args:
        config: the model.
        machine: what it runs on.
        shares: share of tokens that run each depth.
        prompt, new: tokens of each request.
        batch: sequences that go on together.
    """
    work = Work(tuple(shares), prompt + (new - 1) / 2, 0.0)
    read = weight_bytes(config, machine.itemsize)
    read += batch * kv_bytes_read(config, work, machine.itemsize)
    step = max(batch * flops(config, work) / machine.flops_per_s, read / machine.bytes_per_s)
    before = flops_per_token(config, prompt, list(shares))
    prefill = prompt * (before.forward - before.head) / machine.flops_per_s
    return 1 / (prefill + new * step / batch)
