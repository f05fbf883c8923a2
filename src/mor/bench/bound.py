"""The cost model: what no schedule and no code could beat, from the machine's measured rates.

Per new token a model needs

    mean depth x K layers + prelude + coda + head     matrix products, at the row counts of passes
    the cached entries of every depth it visits       bytes to read

The **absolute bound** prices the products at the best measured rate among row counts that a pass
could have (no pass carries more tokens than there are clients), and the entries at the machine's
reading speed; norms, rotations, softmax, sampling and all scheduling are free in it. The bound **at
its own sizes** prices them at the mean sizes of the passes and gatherings that the engine really
had: what is lost against that is lost in the code, the rest in how full the passes were. The
**relative bound** is the ratio of FLOPs to our vanilla's, the head included.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mor.bench.rates import Rates, head_shape, layer_shapes
from mor.bench.trace import Run
from mor.bench.workload import Workload
from mor.config import MoRConfig
from mor.model.flops import flops_per_token, keys_seen

# Rows at which prompts are priced: chunks of them are laid end to end.
PROMPT_ROWS = 128


@dataclass(frozen=True)
class Work:
    """What one new token costs on a model, prompts shared out among new tokens.

    Attributes:
        shares: share of tokens that run each depth.
        context: mean entries that a new token attends to in a layer that all tokens run.
        prompts: prompt tokens per new token.
    """

    shares: tuple[float, ...]
    context: float
    prompts: float

    @property
    def mean_depth(self) -> float:
        """Mean recursions per token of the workload."""
        return sum(self.shares)


def work_of(config: MoRConfig, workload: Workload, depths: Sequence[int]) -> Work:
    """The work of a run; without depths every token runs all recursions that the model has."""
    recursions = config.num_recursions
    shares = tuple(sum(d > r for d in depths) / max(1, len(depths)) for r in range(recursions))
    if not depths:
        shares = (1.0,) * recursions
    new = workload.output_tokens
    # The new token t (from 0) of a request attends to its prompt and t more.
    met = sum(a.new_tokens * (len(a.prompt) + (a.new_tokens - 1) / 2) for a in workload.asks)
    return Work(shares, met / new, sum(len(a.prompt) for a in workload.asks) / new)


def flops(config: MoRConfig, work: Work) -> float:
    """FLOPs per new token, its share of the prompts included (no head is run for these)."""
    # flops_per_token counts the causal half of a sequence, which is then the context.
    one = flops_per_token(config, round(2 * work.context), list(work.shares))
    return one.forward + work.prompts * (one.forward - one.head)


def kv_bytes_read(config: MoRConfig, work: Work, itemsize: int = 4) -> float:
    """Bytes of keys and values that a new token reads over all layers and depths."""
    entry = 2 * config.num_key_value_heads * config.head_dim * itemsize
    private = config.num_prelude_layers + config.num_coda_layers
    shares = list(work.shares)
    seen = keys_seen(config, shares, 1.0)
    visited = sum(share * keys for share, keys in zip(shares, seen, strict=True))
    return entry * work.context * (private + config.num_recursion_layers * visited)


def seconds_per_token(
    config: MoRConfig,
    work: Work,
    rates: Rates,
    pass_rows: float,
    gather_rows: float,
    *,
    own_sizes: bool = False,
) -> dict[str, float]:
    """Where the time of a new token goes, by part.

    Args:
        config, work: what is run.
        rates: of the machine.
        pass_rows, gather_rows: tokens of a pass of the block, and of a gathering.
        own_sizes: price exactly these sizes, not the best up to them.
    """

    def price(shape: tuple[int, int], rows: float) -> float:
        if own_sizes:
            return rates.at(shape, rows) / max(1.0, rows)
        return rates.per_row(shape, max(1, int(rows)))

    def layer(rows: float) -> float:
        return sum(price(shape, rows) for shape in layer_shapes(config))

    block = work.mean_depth * config.num_recursion_layers
    private = config.num_prelude_layers + config.num_coda_layers
    prompt_layer = sum(rates.per_row(shape, PROMPT_ROWS) for shape in layer_shapes(config))
    return {
        "block": block * layer(pass_rows),
        "prelude_coda": private * layer(gather_rows),
        "head": price(head_shape(config), gather_rows),
        "attention": kv_bytes_read(config, work, rates.itemsize) / rates.read_bytes_per_s,
        "prompts": work.prompts * (block + private) * prompt_layer,
    }


def bounds(
    config: MoRConfig, workload: Workload, run: Run, rates: Rates, saves_depth: bool
) -> dict[str, float]:
    """Tokens per second that the cost model allows, and what it is made of.

    Returns:
        ``bound`` (absolute), ``own_bound`` (at the run's own sizes, where the engine counted
        them), ``flops_per_token``, and ``bound_PART_s`` for each part of the absolute one.
    """
    work = work_of(config, workload, run.depths)
    clients, sizes = workload.sizes(config.num_recursions, saves_depth)
    parts = seconds_per_token(config, work, rates, sizes["max_num_seqs"], clients)
    found = {"bound": 1 / sum(parts.values()), "flops_per_token": flops(config, work)}
    found |= {f"bound_{name}_s": seconds for name, seconds in parts.items()}
    if run.counters:
        own = seconds_per_token(
            config, work, rates, run.counters["tokens_per_tick"],
            run.counters["tokens_per_gathering"], own_sizes=True,
        )  # fmt: skip
        found["own_bound"] = 1 / sum(own.values())
    return found
