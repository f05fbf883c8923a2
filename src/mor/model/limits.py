"""How deep one forward pass may go and by which rule, where it may exit, and what may be kept."""

from __future__ import annotations

from collections.abc import Collection

from mor.config import MoRConfig
from mor.config.choices import Routing
from mor.model.cache import DepthCache
from mor.model.routers.base import Router


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


def check_cache(config: MoRConfig, cache: DepthCache | None) -> None:
    """Refuse a cache for a model that sees in both directions.

    Raises:
        ValueError: there is one, and later tokens would change what it holds.
    """
    if cache is not None and not config.is_causal:
        raise ValueError(
            "is_causal=False: later tokens change what earlier ones are, so nothing can be cached; "
            "leave the cache out, or train with is_causal=True"
        )


def choose_rule(
    config: MoRConfig, router: Router, routing: Routing | None, training: bool
) -> Routing:
    """The rule that chooses depth: what was asked for, else what the mode calls for.

    An encoder reads its whole input before it answers, so that top-k within a row is a rule that it
    can follow in inference.
    """
    if routing is not None:
        return routing
    whole = not config.is_causal and router.selects_in_rows
    return "topk" if training or whole else "causal"
