"""Which layer of an unrolled stack feeds which shared layer, and how many layers a stack needs.

A stack of L layers becomes a model of R recursions in two steps (paper section 2.1 and appendix on
uptraining; arXiv 2410.20672 for the initialisation strategies). It is thinned where its shared part
does not divide by R, and each shared layer is made from one layer of what is left, or from the mean
of several. Everything here is arithmetic on indices; no tensor is touched.
"""

from __future__ import annotations

import warnings
from typing import Any, Literal, get_args

import numpy as np

from mor.config import ConfigError
from mor.config.choices import Sharing

Initialization = Literal["stepwise", "average", "lower", "upper", "random", "repeat"]


def _spread(low: int, high: int, count: int) -> list[int]:
    """``count`` indices from ``low`` to ``high``, evenly spaced, halves rounded to even."""
    return [round(float(place)) for place in np.linspace(low, high, count)]


def _private(
    sharing: str, num_prelude_layers: int | None, num_coda_layers: int | None
) -> tuple[int, int]:
    """Private layers before and after the shared ones."""
    if sharing not in get_args(Sharing):
        allowed = ", ".join(get_args(Sharing))
        raise ConfigError(f"sharing={sharing!r} is not known; use one of: {allowed}")
    middle = sharing.startswith("middle_")
    prelude = int(middle) if num_prelude_layers is None else num_prelude_layers
    coda = int(middle) if num_coda_layers is None else num_coda_layers
    if min(prelude, coda) < 0 or (not middle and prelude + coda):
        raise ConfigError(
            f"num_prelude_layers={prelude} and num_coda_layers={coda} do not fit "
            f"sharing={sharing!r}: 'middle_*' takes 0 or more, the others have no private layers"
        )
    return prelude, coda


def thinned_layers(
    num_layers: int,
    num_recursions: int,
    sharing: Sharing,
    num_prelude_layers: int | None = None,
    num_coda_layers: int | None = None,
    num_recursion_layers: int | None = None,
    initialization: Initialization = "stepwise",
) -> list[int]:
    """Layers of the stack that stay, so that the shared part divides by ``num_recursions``.

    The shared part keeps its first and last layer and, between them, as many evenly spaced ones as
    make a multiple of R. Private layers always stay. Nothing is left out where it divides already.

    With fewer ``num_recursion_layers`` than fit, ``lower`` and ``upper`` under ``cycle`` keep their
    shared layers' own places whole, as the first use or the last; the other uses are spread over
    the rest. With one recursion that leaves out neighbouring layers and shares none.

    With ``repeat`` nothing is left out: the shared part runs R times as it is, so the unrolled
    stack is longer than L.

    Args:
        num_layers: L, layers of the unrolled stack.
        num_recursions: R.
        sharing: the rule; ``middle_*`` has private layers.
        num_prelude_layers, num_coda_layers: private layers before and after; default 1 for
            ``middle_*`` and 0 otherwise.
        num_recursion_layers: layers of the block; default as many as fit.
        initialization: what the shared layers start from; matters with fewer than fit.

    Returns:
        Indices into the stack, ascending but for ``repeat``.

    Raises:
        ConfigError: fewer shared layers than recursions or than ``num_recursion_layers`` needs, or
            an unknown ``sharing``.
    """
    prelude, coda = _private(sharing, num_prelude_layers, num_coda_layers)
    shared = num_layers - prelude - coda
    if num_recursions < 1 or shared < num_recursions:
        needed = prelude + coda + max(1, num_recursions)
        raise ConfigError(
            f"num_layers={num_layers} leaves {max(0, shared)} layers to share; "
            f"num_recursions={num_recursions} needs at least {needed} layers in all"
        )
    repeat = initialization == "repeat"
    if repeat and not sharing.endswith("cycle"):
        raise ConfigError(
            f"initialization='repeat' runs the shared layers one after another, again and again; "
            f"sharing={sharing!r} does not: use cycle or middle_cycle"
        )
    if repeat and num_recursion_layers not in (None, shared):
        raise ConfigError(
            f"num_recursion_layers={num_recursion_layers} does not fit: initialization='repeat' "
            f"leaves nothing out, and {prelude} layers before and {coda} after leave {shared}"
        )
    fit = shared if repeat else shared // num_recursions
    block = fit if num_recursion_layers is None else num_recursion_layers
    if not 1 <= block <= fit:
        raise ConfigError(
            f"num_recursion_layers={block} does not fit: {num_layers} layers with {prelude} before "
            f"and {coda} after leave {shared} for num_recursions={num_recursions}, so 1 to {fit}"
        )
    end, more = prelude + shared, block * (num_recursions - 1)
    whole = num_recursion_layers is not None and sharing.endswith("cycle")
    if repeat:
        middle = [*range(prelude, end)] * num_recursions
    elif whole and initialization == "lower":
        middle = [*range(prelude, prelude + block), *_strides(prelude + block, end, more)]
    elif whole and initialization == "upper":
        middle = [*_strides(prelude, end - block, more), *range(end - block, end)]
    else:
        middle = _spread(prelude, end - 1, block * num_recursions)
    return [*range(prelude), *middle, *range(end, num_layers)]


def _strides(low: int, high: int, count: int) -> list[int]:
    """``count`` indices at even strides from the layer before ``low`` to the last before ``high``.

    The last one is always there: what follows gets the stream that it is used to.
    """
    return _spread(low - 1, high - 1, count + 1)[1:]


def source_layers(
    num_layers: int,
    num_recursions: int,
    sharing: Sharing,
    initialization: Initialization,
    rng: np.random.Generator | None = None,
    *,
    base_depth: int | None = None,
    num_prelude_layers: int | None = None,
    num_coda_layers: int | None = None,
    num_recursion_layers: int | None = None,
) -> list[tuple[int, ...]]:
    """For each shared layer, the layers of the unrolled stack whose mean it starts from.

    ``stepwise`` takes evenly spaced layers, both ends included; ``lower`` and ``upper`` the first
    and last of the shared part; ``random`` distinct ones in ascending order; ``average`` the mean
    over exactly the unrolled layers that the shared layer will serve. Norm weights follow the same
    rule, also where they are kept apart afterwards. Prelude and coda keep their own layers. With
    ``repeat`` each shared layer is the source's own.

    Args:
        num_layers: L, layers of the unrolled stack, before any thinning.
        num_recursions: R.
        sharing: ``cycle``, ``sequence``, ``middle_cycle`` or ``middle_sequence``.
        initialization: the strategy.
        rng: for ``random``; default a fresh, unseeded one.
        base_depth: with ``num_recursions=1`` and no private layers: make a plain model of so many
            layers, started as the shared layers of ``L / base_depth`` recursions would be.
        num_prelude_layers, num_coda_layers, num_recursion_layers: as in :func:`thinned_layers`.

    Returns:
        One tuple per shared layer, of one index, or of R for ``average``.

    Raises:
        ConfigError: naming the field that does not fit.
    """
    if initialization not in get_args(Initialization):
        allowed = ", ".join(get_args(Initialization))
        raise ConfigError(f"initialization={initialization!r} is not known; use one of: {allowed}")
    prelude, coda = _private(sharing, num_prelude_layers, num_coda_layers)
    if base_depth is not None:
        num_recursions = _recursions_for(num_layers, num_recursions, base_depth, prelude + coda)
    stack = thinned_layers(
        num_layers,
        num_recursions,
        sharing,
        num_prelude_layers,
        num_coda_layers,
        num_recursion_layers,
        initialization,
    )
    low, high = prelude, len(stack) - coda - 1
    count = (high - low + 1) // num_recursions
    if initialization == "average":
        sources = [
            [low + unrolled for unrolled in served]
            for served in _served(count, num_recursions, sharing)
        ]
    elif initialization == "stepwise":
        sources = [[layer] for layer in _spread(low, high, count)]
    elif initialization in ("lower", "repeat"):
        sources = [[low + i] for i in range(count)]
    elif initialization == "upper":
        sources = [[high - count + 1 + i] for i in range(count)]
    else:
        rng = np.random.default_rng() if rng is None else rng
        drawn = rng.choice(high - low + 1, size=count, replace=False)
        sources = [[low + int(i)] for i in np.sort(drawn)]
    return [tuple(stack[layer] for layer in layers) for layers in sources]


def _served(count: int, num_recursions: int, sharing: str) -> list[range]:
    """Unrolled layers, counted from the first shared one, that each shared layer serves."""
    if sharing.endswith("sequence"):
        return [range(i * num_recursions, (i + 1) * num_recursions) for i in range(count)]
    return [range(i, count * num_recursions, count) for i in range(count)]


def _recursions_for(num_layers: int, num_recursions: int, base_depth: int, private: int) -> int:
    """R of the recursive model whose shared layers make a plain model of ``base_depth`` layers."""
    if num_recursions != 1 or private:
        raise ConfigError(
            f"base_depth={base_depth} makes a plain model of so many layers: it needs "
            "num_recursions=1 and sharing='cycle' or 'sequence'"
        )
    if not 1 <= base_depth <= num_layers or num_layers % base_depth:
        fitting = [d for d in range(1, num_layers + 1) if num_layers % d == 0]
        raise ConfigError(
            f"base_depth={base_depth} must divide num_layers={num_layers}; use one of {fitting}"
        )
    return num_layers // base_depth


def recursion_config(
    num_layers: int,
    num_recursions: int,
    sharing: Sharing = "middle_cycle",
    *,
    num_prelude_layers: int | None = None,
    num_coda_layers: int | None = None,
    num_recursion_layers: int | None = None,
    initialization: Initialization = "stepwise",
    thin: bool = False,
) -> dict[str, Any]:
    """The depth fields of :class:`~mor.config.MoRConfig` for an unrolled stack of ``num_layers``.

    Args:
        num_layers: L, unrolled layers.
        num_recursions: R.
        sharing: the rule.
        num_prelude_layers, num_coda_layers: as in :func:`thinned_layers`.
        num_recursion_layers: layers of the block, where fewer than fit are wanted.
        initialization: with ``repeat`` the stack is as long as R passes make it.
        thin: where the shared part does not divide by R, warn and leave out layers as
            :func:`thinned_layers` does, instead of raising.

    Raises:
        ConfigError: it does not divide; the message names the nearest counts that do.
    """
    prelude, coda = _private(sharing, num_prelude_layers, num_coda_layers)
    private = prelude, coda, num_recursion_layers
    left = len(
        thinned_layers(num_layers, num_recursions, sharing, *private, initialization=initialization)
    )
    if left < num_layers and num_recursion_layers is None:
        shared = num_layers - prelude - coda
        said = (
            f"num_layers={num_layers} with sharing={sharing!r} has {shared} layers to share, "
            f"which num_recursions={num_recursions} does not divide"
        )
        if not thin:
            raise ConfigError(f"{said}; the nearest that do are {left} and {left + num_recursions}")
        warnings.warn(f"{said}: thinned to {left} layers", stacklevel=2)
    return {
        "num_recursions": num_recursions,
        "num_prelude_layers": prelude,
        "num_recursion_layers": (left - prelude - coda) // num_recursions,
        "num_coda_layers": coda,
        "sharing": sharing,
    }
