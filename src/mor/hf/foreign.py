"""Transformers' own caches where ours is needed: an empty one becomes ours, a filled one is read.

The documented loops of Transformers make a ``DynamicCache``, hand it to every call and expect it to
have grown. PEFT's prefix tuning hands one whose entries are learned. Both are understood; what
else there is (static, quantised, offloaded) stays refused by name.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from mor.config import MoRConfig
from mor.hf.cache import MoRCache
from mor.model.cache import KVGroup


def is_plain(cache: Any) -> bool:
    """Whether ``cache`` is a ``DynamicCache`` that keeps all its entries where they are made."""
    return type(cache) is DynamicCache and not getattr(cache, "offloading", False)


def is_empty(cache: Any) -> bool:
    """Whether nothing was cached yet."""
    return cache.get_seq_length() == 0


def become_ours(given: Any, config: MoRConfig) -> MoRCache:
    """Make a plain ``DynamicCache`` a :class:`MoRCache`, the same object, with its entries.

    The same object, since loops go on with the one that they made: a new one beside it would leave
    theirs empty, and the next call would have forgotten the text.

    Args:
        given: see :func:`is_plain`.
        config: of the model that is to go on with it.

    Raises:
        ValueError: entries of another number of layers, or of another shape.
    """
    entries = [] if is_empty(given) else _entries(given, config)
    given.__class__ = MoRCache
    MoRCache.__init__(given, config)
    pour(given, entries)
    return given


def pour_from(given: Any, cache: MoRCache) -> MoRCache:
    """Put the entries of a filled ``DynamicCache`` into an empty cache of ours.

    Raises:
        ValueError: as of :func:`become_ours`.
    """
    pour(cache, _entries(given, cache.config))
    return cache


def _entries(given: Any, config: MoRConfig) -> list[tuple[Tensor, Tensor]]:
    """Keys and values [B, Hkv, n, d] of every unrolled layer."""
    found = [(layer.keys, layer.values) for layer in given.layers]
    wanted = (config.num_key_value_heads, config.head_dim)
    shape = tuple(found[0][0].shape)
    if len(found) != config.num_hidden_layers or (shape[1], shape[3]) != wanted:
        raise ValueError(
            f"the DynamicCache holds {len(found)} layers of shape {list(shape)}; this model has "
            f"{config.num_hidden_layers} unrolled layers of [B, {wanted[0]}, n, {wanted[1]}]"
        )
    return found


def pour(cache: MoRCache, entries: list[tuple[Tensor, Tensor]]) -> None:
    """Fill an empty cache with n tokens that every depth is to see, one entry per unrolled layer.

    Gradients flow back into the entries. Under KV sharing a shared layer has the entries of its
    first use (and with ``recursive_update`` those of each use).

    Args:
        cache: of ours, empty.
        entries: keys and values, each [B, Hkv, n, d], by unrolled layer; none for nothing to do.
    """
    if not entries:
        return
    config, (batch, _, tokens, _) = cache.config, entries[0][0].shape
    cache.prepare(batch, entries[0][0].device)
    assert cache.prelude is not None
    assert cache.coda is not None
    every = torch.arange(batch, device=entries[0][0].device)
    counts, numbers = torch.full_like(every, tokens), torch.arange(tokens, device=every.device)
    slots = numbers.expand(batch, tokens)
    for group in cache.groups():
        group.reserve(every, counts, tokens)
        group.tokens[:, :tokens] = group.slots[:, :tokens] = numbers
    first, last = config.num_prelude_layers, len(entries) - config.num_coda_layers
    for layer, (key, value) in enumerate(entries):
        group, name = cache.prelude, layer
        if layer >= last:
            group, name = cache.coda, layer - last
        elif layer >= first:
            place = _place(cache, layer - first)
            if place is None:
                continue
            group, name = place
        group.write(name, every, slots, key, value)
    cache.seen, cache.columns = counts, tokens


def _place(cache: MoRCache, unrolled: int) -> tuple[KVGroup, int] | None:
    """Where the entries of layer ``unrolled`` of the recursions lie; None where nobody reads."""
    config = cache.config
    own = unrolled // config.num_recursion_layers
    if config.kv_sharing == "none":
        return cache.depths[own], unrolled
    if config.repetition(unrolled) == 0:
        return cache.depths[0], config.shared_layer(unrolled)
    if config.kv_sharing == "recursive":
        return None
    return cache.depths[own], config.shared_layer(unrolled)
