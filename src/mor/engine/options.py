"""How much the engine takes on at a time: its numbers, checked, with their defaults."""

from __future__ import annotations

from dataclasses import dataclass

from mor.checks import check_whole
from mor.config import MoRConfig


@dataclass(frozen=True)
class Sizes:
    """What :class:`~mor.engine.Engine` was asked for, every default worked out.

    Attributes:
        max_num_seqs: new tokens that one pass of the block carries.
        max_residents: requests that hold pages at a time.
        min_gather: tokens that wait for the coda before it runs.
        prefill_chunk: tokens of prompts that one pass of the block carries.
        page_size: tokens per page.
        max_model_len: most tokens of prompt and output together.
        max_depth: depth cap for all requests.
    """

    max_num_seqs: int
    max_residents: int
    min_gather: int
    prefill_chunk: int
    page_size: int
    max_model_len: int
    max_depth: int

    @property
    def lanes(self) -> int:
        """Tokens in flight at most."""
        return self.max_residents + 2 * self.prefill_chunk


def resolve_sizes(
    config: MoRConfig,
    *,
    max_num_seqs: int,
    max_residents: int | None,
    min_gather: int | None,
    prefill_chunk: int,
    page_size: int,
    max_model_len: int | None,
    max_depth: int | None,
) -> Sizes:
    """The engine's numbers for a model; None stands for a default.

    Raises:
        MorError: naming the argument, its value and what would be right.
    """
    longest, deepest = config.max_position_embeddings, config.num_recursions
    numbers = {
        "max_num_seqs": max_num_seqs,
        "max_residents": 2 * max_num_seqs if max_residents is None else max_residents,
        "min_gather": max(1, max_num_seqs // 2) if min_gather is None else min_gather,
        "prefill_chunk": prefill_chunk,
        "page_size": page_size,
    }
    for name, value in numbers.items():
        check_whole(name, value, 1)
    length = longest if max_model_len is None else max_model_len
    check_whole("max_model_len", length, 1, longest)
    depth = deepest if max_depth is None else max_depth
    check_whole("max_depth", depth, 1, deepest)
    fixed = config.router_fixed_depth if config.router == "fixed" else None
    return Sizes(**numbers, max_model_len=length, max_depth=min(fixed or deepest, depth))
