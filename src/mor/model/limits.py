"""How deep one forward pass may go, and where it may exit."""

from __future__ import annotations

from collections.abc import Collection

from mor.config import MoRConfig
from mor.model.cache import DepthCache


def limit_depth(config: MoRConfig, max_depth: int | None) -> int:
    """The depth cap of a forward pass: what was asked for, and at most the fixed depth or R.

    Raises:
        ValueError: a cap outside 1..R.
    """
    fixed = config.router_fixed_depth if config.router == "fixed" else None
    limit = fixed or config.num_recursions
    if max_depth is None:
        return limit
    if not 1 <= max_depth <= config.num_recursions:
        raise ValueError(
            f"max_depth={max_depth} must lie in 1..num_recursions={config.num_recursions}"
        )
    return min(limit, max_depth)


def check_exits(config: MoRConfig, exits: Collection[int], cache: DepthCache | None) -> None:
    """Refuse exits that cannot be.

    Raises:
        ValueError: an exit outside 1..R, or exits with a cache.
    """
    if any(not 1 <= passes <= config.num_recursions for passes in exits):
        raise ValueError(
            f"exits={list(exits)} must lie in 1..num_recursions={config.num_recursions}"
        )
    if exits and cache is not None:
        raise ValueError("exits cannot be given with a cache: the coda keeps one entry a token")
