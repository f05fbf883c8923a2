"""Which configurations make sense. Every message names the field, its value and what is right."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import TYPE_CHECKING, Any, get_args

from mor.config.choices import (
    Balancing,
    DecisionRule,
    KVSharing,
    Objective,
    Relaxation,
    RouterActivation,
    RouterArchitecture,
    RouterType,
    Sharing,
    UpdateRule,
)
from mor.errors import MorError

if TYPE_CHECKING:
    from mor.config import MoRConfig

# Those whose frequencies do not change with the length of the sequence.
ROPE_TYPES = ("default", "linear", "llama3", "yarn")


class ConfigError(MorError, ValueError):
    """A field of the configuration is wrong; the message names it and says what would be right."""


def _one_of(name: str, value: Any, choices: Any) -> None:
    if value not in get_args(choices):
        allowed = ", ".join(get_args(choices))
        raise ConfigError(f"{name}={value!r} is not known; use one of: {allowed}")


def _is_number(value: Any, *kinds: type) -> bool:
    # type() and not isinstance: True is no number here.
    return type(value) in kinds and math.isfinite(value)


def _whole(config: MoRConfig, minimum: int, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if not _is_number(value, int) or value < minimum:
            raise ConfigError(f"{name}={value!r} must be a whole number of at least {minimum}")


def _real(config: MoRConfig, *names: str, zero: bool = False) -> None:
    for name in names:
        value = getattr(config, name)
        if not _is_number(value, int, float) or value < 0 or (value == 0 and not zero):
            raise ConfigError(f"{name}={value!r} must be a number {'>=' if zero else '>'} 0")


def _begin_of_text(config: MoRConfig) -> None:
    added, bos = config.add_bos_token, config.bos_token_id
    if not (added is None or isinstance(added, bool)):
        raise ConfigError(f"add_bos_token={added!r} must be true or false, or be left out")
    if added and (bos is None or not 0 <= bos < config.vocab_size):
        raise ConfigError(
            f"add_bos_token=True needs the token: bos_token_id={bos} must lie in 0..vocab_size - 1"
        )


def check_config(config: MoRConfig) -> None:
    """Validate every field.

    Raises:
        ConfigError: naming the first wrong field.
    """
    _whole(
        config,
        1,
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "max_position_embeddings",
        "num_recursions",
        "num_recursion_layers",
    )
    _whole(config, 0, "num_prelude_layers", "num_coda_layers")
    _whole(config, 0, "router_capacity_warmup_steps", "router_balance_warmup_steps")
    _real(config, "rms_norm_eps", "initializer_range", "router_temperature")
    _real(config, "router_aux_loss_coef", "router_z_loss_coef", zero=True)
    _real(config, "router_balancing_loss_coef", "router_bias_update_rate", zero=True)
    for name in ("attention_bias", "attention_out_bias", "mlp_bias", "use_qk_norm"):
        if not isinstance(getattr(config, name), bool):
            raise ConfigError(f"{name}={getattr(config, name)!r} must be true or false")
    pad = config.pad_token_id
    if pad is not None and not 0 <= pad < config.vocab_size:
        raise ConfigError(f"pad_token_id={pad} must lie in 0..vocab_size - 1 or be left out")
    _begin_of_text(config)
    if config.num_attention_heads % config.num_key_value_heads:
        raise ConfigError(
            f"num_key_value_heads={config.num_key_value_heads} must divide "
            f"num_attention_heads={config.num_attention_heads}"
        )
    if config.head_dim % 2:
        raise ConfigError(f"head_dim={config.head_dim} must be even: RoPE rotates two halves")
    rope_type = config.rope_parameters.get("rope_type", "default")
    if rope_type not in ROPE_TYPES:
        raise ConfigError(
            f"rope_parameters['rope_type']={rope_type!r} is not supported; use one of: "
            f"{', '.join(ROPE_TYPES)}"
        )
    _one_of("sharing", config.sharing, Sharing)
    _one_of("kv_sharing", config.kv_sharing, KVSharing)
    _one_of("relaxation", config.relaxation, Relaxation)
    _one_of("update_rule", config.update_rule, UpdateRule)
    _one_of("router", config.router, RouterType)
    _one_of("router_architecture", config.router_architecture, RouterArchitecture)
    _one_of("router_activation", config.router_activation, RouterActivation)
    _one_of("router_objective", config.router_objective, Objective)
    _one_of("router_balancing", config.router_balancing, Balancing)
    _one_of("router_decision_rule", config.router_decision_rule, DecisionRule)
    _check_sharing(config)
    _check_relaxation(config)
    _check_router(config)


def _check_sharing(config: MoRConfig) -> None:
    private = config.num_prelude_layers + config.num_coda_layers
    if not config.sharing.startswith("middle_") and private:
        raise ConfigError(
            f"sharing={config.sharing!r} has no private layers, but num_prelude_layers="
            f"{config.num_prelude_layers} and num_coda_layers={config.num_coda_layers}; "
            f"use sharing='middle_{config.sharing}' or set both to 0"
        )
    if config.interleaved and config.is_routed:
        raise ConfigError(
            f"router={config.router!r} needs the block to be applied as a whole; "
            f"sharing={config.sharing!r} repeats single layers: use 'cycle' or 'middle_cycle'"
        )
    if config.interleaved and config.kv_sharing == "recursive_update":
        raise ConfigError(
            "kv_sharing='recursive_update' refreshes keys and values per depth and needs "
            f"sharing='cycle' or 'middle_cycle', not {config.sharing!r}"
        )


def _check_relaxation(config: MoRConfig) -> None:
    if config.relaxation == "none":
        return
    if config.num_recursions < 2:
        raise ConfigError(
            f"relaxation={config.relaxation!r} makes uses of a shared layer differ and needs "
            f"num_recursions of at least 2, not {config.num_recursions}; use 'none'"
        )
    _whole(config, 1, "relaxation_rank")
    if config.relaxation_alpha is not None:
        _real(config, "relaxation_alpha")


def _check_router(config: MoRConfig) -> None:
    depths, capacities = config.num_recursions, config.router_capacities
    if config.is_routed and depths < 2:
        raise ConfigError(
            f"router={config.router!r} chooses between depths and needs num_recursions of at "
            f"least 2, not {depths}; use router='fixed' for one recursion"
        )
    if len(capacities) != depths:
        raise ConfigError(
            f"router_capacities={capacities} has {len(capacities)} entries; "
            f"num_recursions={depths} needs one for each depth"
        )
    if any(not 0 < c <= 1 for c in capacities):
        raise ConfigError(f"router_capacities={capacities}: each must lie in (0, 1]")
    if any(b > a for a, b in pairwise(capacities)):
        raise ConfigError(
            f"router_capacities={capacities} rises with depth; a token that has left cannot "
            "come back: give a non-increasing list"
        )
    fixed = config.router_fixed_depth
    if fixed is not None and not 1 <= fixed <= depths:
        raise ConfigError(f"router_fixed_depth={fixed} must lie in 1..num_recursions={depths}")
    token_choice, softmax = config.router == "token_choice", config.router_activation == "softmax"
    if softmax and config.is_routed and not token_choice:
        raise ConfigError(
            "router_activation='softmax' compares depths and belongs to router='token_choice'; "
            "use 'sigmoid', 'tanh' or 'none'"
        )
    if token_choice and config.router_activation not in ("softmax", "sigmoid"):
        raise ConfigError(
            f"router_activation={config.router_activation!r} is not defined for "
            "router='token_choice'; use 'softmax' or 'sigmoid'"
        )
    if not _is_number(config.router_gate_bias, int, float):
        raise ConfigError(f"router_gate_bias={config.router_gate_bias!r} must be a number")
    if config.router_gate_bias and config.router_activation == "softmax":
        raise ConfigError(
            f"router_gate_bias={config.router_gate_bias} does nothing under "
            "router_activation='softmax'; use 'sigmoid' or leave it at 0"
        )
    if not 0 <= config.router_boundary_momentum < 1:
        raise ConfigError(
            f"router_boundary_momentum={config.router_boundary_momentum} must lie in [0, 1)"
        )
