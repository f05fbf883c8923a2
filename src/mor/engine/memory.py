"""How many pages sequences need, and how large a pool the machine has room for."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from mor.config import MoRConfig
from mor.engine.entries import entry_bytes
from mor.errors import MorError


def block_layers(config: MoRConfig, limit: int) -> int:
    """Layers that have pages of their own in one row of the block's table."""
    if config.interleaved and config.kv_sharing == "none":
        return config.num_recursion_layers * limit
    return config.num_recursion_layers


def pages_for(config: MoRConfig, tokens: int, depth: int, page_size: int) -> int:
    """Pages that ``tokens`` tokens need when all of them run ``depth`` recursions."""
    one_row = config.interleaved or config.kv_sharing == "recursive"
    rows = 1 if one_row else depth + (config.kv_sharing == "propagate")
    layers = config.num_prelude_layers + config.num_coda_layers
    layers += block_layers(config, depth) * rows
    return -(-tokens // page_size) * layers


def tokens_held(config: MoRConfig, num_pages: int, depth: int, page_size: int) -> int:
    """Most tokens of one sequence that a pool holds when all of them run ``depth`` recursions."""
    return num_pages // max(1, pages_for(config, 1, depth, page_size)) * page_size


def check_fraction(fraction: float) -> None:
    """Refuse what is no share of memory.

    Raises:
        MorError: it does not lie between 0 and 1.
    """
    if isinstance(fraction, bool) or not isinstance(fraction, (int, float)) or not 0 < fraction < 1:
        raise MorError(f"memory_fraction={fraction!r} must lie between 0 and 1")


def free_memory(device: torch.device) -> int | None:
    """Bytes that are free on ``device``; None where the system does not say."""
    if device.type == "cuda":
        # What torch keeps of tensors that are gone is free for us: the pool of an engine before.
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + kept
    info = Path("/proc/meminfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return None


def resident_memory() -> int:
    """Bytes of this process that are in memory; 0 where the system does not say."""
    sizes = Path("/proc/self/statm")
    return int(sizes.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if sizes.is_file() else 0


def pages_that_fit(
    config: MoRConfig,
    depth: int,
    page_size: int,
    tokens: int,
    fraction: float,
    dtype: torch.dtype,
    device: torch.device,
) -> int:
    """Pages for ``tokens`` tokens that all run ``depth`` recursions, within a share of memory.

    Raises:
        MorError: ``memory_fraction`` is no share, or leaves room for no token at all.
    """
    check_fraction(fraction)
    wanted = pages_for(config, tokens, depth, page_size)
    page_bytes = page_size * entry_bytes(config.num_key_value_heads, config.head_dim, dtype)
    free = free_memory(device)
    if free is None:
        return wanted
    fits = int(free * fraction) // page_bytes
    if fits < pages_for(config, 1, depth, page_size):
        raise MorError(
            f"memory_fraction={fraction} of {free >> 20} MiB holds {fits} pages of "
            f"{page_bytes} bytes, too few for one token; free some memory or set num_pages"
        )
    return min(wanted, fits)
