"""How a vanilla stack is to be folded: the choices, the layers they name, the configuration."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from mor.config import ConfigError, MoRConfig
from mor.config.choices import KVSharing, Relaxation, RouterType, Sharing
from mor.model.sharing import Initialization, recursion_config, source_layers, thinned_layers

Norms = Literal["shared", "apart", "own"]

GATE_BIAS = 2.0
"""A logit of 0 is then a gate of 1 with slope 0.12, and no logit makes it more than 1.14."""


@dataclass(frozen=True)
class Folding:
    """How a stack is folded.

    Attributes:
        num_recursions: R.
        sharing: which unrolled layer uses which shared layer.
        init: which layers the shared ones start from; ``repeat`` leaves no layer out and adds
            passes through the middle ones.
        num_prelude_layers, num_coda_layers: private layers; default 1 for ``middle_*``, else 0.
        num_recursion_layers: layers of the block; default as many as fit, see
            :func:`~mor.model.sharing.thinned_layers`. With one recursion, the model is the source
            without the layers that do not fit in: the baseline for any folding.
        norms: ``shared``, one set of norm weights per shared layer; ``apart``, one per use, all
            starting equal; ``own``, one per use, starting as the source layer's at that place.
            Default ``own`` with ``lora``, so that only linear maps are approximated, else
            ``shared``.
        relaxation: what else differs between uses.
        start_gain: with ``gains``, what they start at for uses that stand elsewhere than at the
            layer that the shared one starts from. At 0 the model begins as the source without the
            layers at those places, and learns to fill them.
        rank: of ``lora``; None for full rank.
        alpha: of ``lora``, see :class:`~mor.config.MoRConfig`; the start makes up for it.
        kv_sharing: see :class:`~mor.config.MoRConfig`.
        router: ``random`` cannot start as the folded model and is refused.
        capacities: of the depths once warm-up is over; default (R - depth) / R.
        capacity_warmup_steps: optimiser steps from full depth to ``capacities``.
        router_std: spread of router weights; just enough that no two tokens score the same.
        seed: for ``random`` and for what starts at random.
    """

    num_recursions: int
    sharing: Sharing = "middle_cycle"
    init: Initialization = "stepwise"
    num_prelude_layers: int | None = None
    num_coda_layers: int | None = None
    num_recursion_layers: int | None = None
    norms: Norms | None = None
    relaxation: Relaxation = "none"
    start_gain: float = 1.0
    rank: int | None = 16
    alpha: float | None = None
    kv_sharing: KVSharing = "none"
    router: RouterType = "fixed"
    capacities: tuple[float, ...] | None = None
    capacity_warmup_steps: int = 1000
    router_std: float = 1e-5
    seed: int = 0


def layer_map(config: MoRConfig, folding: Folding) -> dict[str, Any]:
    """Where layers come from: ``stack``, those that stay, and ``shared_layers``, their sources."""
    layers, sides = config.num_hidden_layers, _sides(folding)
    return {
        "stack": thinned_layers(
            layers,
            folding.num_recursions,
            folding.sharing,
            **sides,
            initialization=folding.init,
        ),
        "shared_layers": source_layers(
            layers,
            folding.num_recursions,
            folding.sharing,
            folding.init,
            np.random.default_rng(folding.seed),
            **sides,
        ),
    }


def _sides(folding: Folding) -> dict[str, int | None]:
    return {
        "num_prelude_layers": folding.num_prelude_layers,
        "num_coda_layers": folding.num_coda_layers,
        "num_recursion_layers": folding.num_recursion_layers,
    }


def folded_config(config: MoRConfig, folding: Folding) -> MoRConfig:
    """The configuration of the folded model.

    Raises:
        ConfigError: naming what does not fit.
    """
    if config.num_recursions != 1:
        raise ConfigError(
            f"num_recursions={config.num_recursions}: the source is folded already; give a vanilla "
            "model, such as `mor convert` writes"
        )
    _check_recursions(folding)
    if folding.router == "random":
        raise ConfigError(
            "router='random' weighs tokens by chance, so that the model cannot begin as the folded "
            "one; use fixed, threshold, expert_choice or token_choice"
        )
    fields = config.to_dict()
    for name in ("num_hidden_layers", "router_capacities", "model_type", "architectures", "dtype"):
        fields.pop(name, None)
    fields |= recursion_config(
        config.num_hidden_layers,
        folding.num_recursions,
        folding.sharing,
        initialization=folding.init,
        thin=True,
        **_sides(folding),
    )
    largest = min(config.hidden_size, config.intermediate_size)
    largest = max(largest, min(config.hidden_size, config.num_attention_heads * config.head_dim))
    fields |= {
        "share_norms": resolve_norms(folding) == "shared",
        "relaxation": folding.relaxation,
        "relaxation_rank": largest if folding.rank is None else folding.rank,
        "relaxation_alpha": folding.alpha,
        "kv_sharing": folding.kv_sharing,
        "router": folding.router,
    }
    if folding.router != "fixed":
        fields |= open_router_fields(folding.capacity_warmup_steps)
        if folding.capacities is not None:
            fields["router_capacities"] = list(folding.capacities)
    folded = MoRConfig(**fields)
    _check_start_gain(config, folded, folding)
    return folded


def _check_recursions(folding: Folding) -> None:
    if folding.num_recursions >= 2:
        return
    if folding.num_recursions < 1 or folding.num_recursion_layers is None:
        raise ConfigError(
            f"num_recursions={folding.num_recursions} folds nothing; use 2 or more, or 1 with "
            "num_recursion_layers to leave out layers"
        )
    used = {
        "norms": (resolve_norms(folding), "shared"),
        "relaxation": (folding.relaxation, "none"),
        "router": (folding.router, "fixed"),
    }
    for name, (value, only) in used.items():
        if value != only:
            raise ConfigError(
                f"{name}={value!r} needs layers that are used twice; with num_recursions=1 use "
                f"{only!r}"
            )


def starts_at_own_layer(config: MoRConfig, where: dict[str, Any], unrolled: int) -> bool:
    """Whether a use of a shared layer is the first at the layer that it starts from.

    Args:
        config: of the folded model.
        where: from :func:`layer_map`.
        unrolled: counted from the first shared one.
    """
    at = config.num_prelude_layers + unrolled
    place = where["stack"][at]
    own: bool = where["shared_layers"][config.shared_layer(unrolled)] == (place,)
    return own and place not in where["stack"][:at]


def _check_start_gain(source: MoRConfig, config: MoRConfig, folding: Folding) -> None:
    """Where no use of a shared layer stands at its own place, nothing would hold the model up."""
    gain = folding.start_gain
    if gain == 1.0:
        return
    if not 0 <= gain < math.inf:
        raise ConfigError(f"start_gain={gain} must be 0 or more; 1 is without effect")
    if folding.relaxation != "gains":
        raise ConfigError(
            f"start_gain={gain} is where gains start, but relaxation={folding.relaxation!r}; "
            "use relaxation='gains'"
        )
    where = layer_map(source, folding)
    uses = range(config.num_recursions * config.num_recursion_layers)
    home = {config.shared_layer(use) for use in uses if starts_at_own_layer(config, where, use)}
    if len(home) < config.num_recursion_layers:
        raise ConfigError(
            f"start_gain={gain} would make every use of some shared layers quiet: "
            f"init={folding.init!r} with sharing={folding.sharing!r} leaves them no place of their "
            "own; use init lower or upper with cycle or middle_cycle"
        )


def open_router_fields(warmup_steps: int) -> dict[str, Any]:
    """The configuration of a router whose gate can start at 1, and full depth at the start."""
    return {
        "update_rule": "residual",
        "router_activation": "sigmoid",
        "router_gate_bias": GATE_BIAS,
        "router_alpha": 1 + math.exp(-GATE_BIAS),
        "router_capacity_warmup_steps": warmup_steps,
        "router_balance_warmup_steps": warmup_steps,
    }


def windows(config: MoRConfig, leave_out: int) -> list[Folding]:
    """The source without ``leave_out`` neighbouring layers, once for every place after the first.

    Args:
        config: of a vanilla model.
        leave_out: how many.

    Raises:
        ConfigError: it leaves no layer, or none to leave out.
    """
    layers = config.num_hidden_layers
    if not 1 <= leave_out < layers:
        raise ConfigError(
            f"leave_out={leave_out} must be 1 to {layers - 1}: the source has {layers} layers"
        )
    return [
        Folding(
            num_recursions=1,
            init="lower",
            num_prelude_layers=0,
            num_recursion_layers=before,
            num_coda_layers=layers - leave_out - before,
        )
        for before in range(1, layers - leave_out + 1)
    ]


def resolve_norms(folding: Folding) -> Norms:
    """``folding.norms``, or what stands for None."""
    return folding.norms or ("own" if folding.relaxation == "lora" else "shared")
