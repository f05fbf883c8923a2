"""Which configurations make sense. Every message names the field, its value and what is right."""

from __future__ import annotations

from functools import partial
from itertools import pairwise

from mor.checks import check_choice, check_flag, check_real, check_whole
from mor.config.choices import (
    Balancing,
    DecisionRule,
    KVSharing,
    Objective,
    RecursionScale,
    RecursionSeam,
    Relaxation,
    RouterActivation,
    RouterArchitecture,
    RouterType,
    SeamWeight,
    Sharing,
    UpdateRule,
)
from mor.config.fields import Fields
from mor.config.media_rules import check_media
from mor.errors import ConfigError

# Those whose frequencies do not change with the length of the sequence.
ROPE_TYPES = ("default", "linear", "llama3", "yarn")

_whole = partial(check_whole, error=ConfigError)
_real = partial(check_real, error=ConfigError)
_flag = partial(check_flag, error=ConfigError)
_choice = partial(check_choice, error=ConfigError)

_AT_LEAST_ONE = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
    "num_recursions",
    "num_recursion_layers",
    "recursion_streams",
)
_AT_LEAST_ZERO = (
    "num_prelude_layers",
    "num_coda_layers",
    "router_capacity_warmup_steps",
    "router_balance_warmup_steps",
)
# What follows from other fields where it is None.
_DERIVED = (
    "num_key_value_heads",
    "head_dim",
    "num_recursion_layers",
    "num_prelude_layers",
    "num_coda_layers",
)
_MOST_RECURSIONS = 10_000
_ABOVE_ZERO = ("rms_norm_eps", "initializer_range", "router_temperature")
_COEFFICIENTS = (
    "router_aux_loss_coef",
    "router_z_loss_coef",
    "router_balancing_loss_coef",
    "router_bias_update_rate",
)
_FLAGS = ("attention_bias", "attention_out_bias", "mlp_bias", "use_qk_norm", "recursion_scalars")
_CHOICES = {
    "sharing": Sharing,
    "kv_sharing": KVSharing,
    "relaxation": Relaxation,
    "recursion_seam": RecursionSeam,
    "recursion_seam_weight": SeamWeight,
    "recursion_scale": RecursionScale,
    "update_rule": UpdateRule,
    "router": RouterType,
    "router_architecture": RouterArchitecture,
    "router_activation": RouterActivation,
    "router_objective": Objective,
    "router_balancing": Balancing,
    "router_decision_rule": DecisionRule,
}


def check_types(config: Fields, unrolled: int | None) -> None:
    """Refuse what is no whole number where the other fields are worked out from it.

    Args:
        config: with fields that are None still.
        unrolled: ``num_hidden_layers``, where it was given.

    Raises:
        ConfigError: naming the first wrong field.
    """
    given = {name: getattr(config, name) for name in (*_AT_LEAST_ONE, *_AT_LEAST_ZERO)}
    for name, value in (given | {"num_hidden_layers": unrolled}).items():
        derived = value is None and name in (*_DERIVED, "num_hidden_layers")
        if not derived and (not isinstance(value, int) or isinstance(value, bool)):
            _whole(name, value, 0 if name in _AT_LEAST_ZERO else 1)
    if config.num_recursions > _MOST_RECURSIONS:  # each of them has a capacity
        _whole("num_recursions", config.num_recursions, 1, _MOST_RECURSIONS)


def check_config(config: Fields) -> None:
    """Validate every field.

    Raises:
        ConfigError: naming the first wrong field.
    """
    for name in _AT_LEAST_ONE:
        _whole(name, getattr(config, name), 1)
    for name in _AT_LEAST_ZERO:
        _whole(name, getattr(config, name), 0)
    for name in _ABOVE_ZERO:
        _real(name, getattr(config, name), 0, open_low=True)
    for name in _COEFFICIENTS:
        _real(name, getattr(config, name), 0)
    for name in _FLAGS:
        _flag(name, getattr(config, name))
    _check_tokens(config)
    _check_widths(config)
    for name, words in _CHOICES.items():
        _choice(name, getattr(config, name), words)
    _check_sharing(config)
    _check_relaxation(config)
    _check_seam(config)
    _check_exits(config)
    _check_router(config)
    check_media(config)


def _check_tokens(config: Fields) -> None:
    pad, added, bos = config.pad_token_id, config.add_bos_token, config.bos_token_id
    if pad is not None and not (isinstance(pad, int) and 0 <= pad < config.vocab_size):
        raise ConfigError(f"pad_token_id={pad} must lie in 0..vocab_size - 1 or be left out")
    if added is not None:
        _flag("add_bos_token", added)
    if added and (bos is None or not 0 <= bos < config.vocab_size):
        raise ConfigError(
            f"add_bos_token=True needs the token: bos_token_id={bos} must lie in 0..vocab_size - 1"
        )


def _check_widths(config: Fields) -> None:
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


def _check_sharing(config: Fields) -> None:
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
    if config.interleaved and config.kv_sharing in ("recursive_update", "propagate"):
        raise ConfigError(
            f"kv_sharing={config.kv_sharing!r} makes keys and values per depth and needs "
            f"sharing='cycle' or 'middle_cycle', not {config.sharing!r}"
        )


def _check_relaxation(config: Fields) -> None:
    if config.relaxation == "none":
        return
    if config.num_recursions < 2:
        raise ConfigError(
            f"relaxation={config.relaxation!r} makes uses of a shared layer differ and needs "
            f"num_recursions of at least 2, not {config.num_recursions}; use 'none'"
        )
    _whole("relaxation_rank", config.relaxation_rank, 1)
    if config.relaxation_alpha is not None:
        _real("relaxation_alpha", config.relaxation_alpha, 0, open_low=True)


def _check_seam(config: Fields) -> None:
    _real("recursion_seam_init", config.recursion_seam_init)
    used = {
        "recursion_seam": (config.recursion_seam, "none"),
        "recursion_scalars": (config.recursion_scalars, False),
        "recursion_scale": (config.recursion_scale, "none"),
        "recursion_streams": (config.recursion_streams, 1),
    }
    for name, (value, plain) in used.items():
        if value == plain:
            continue
        if config.num_recursions < 2:
            raise ConfigError(
                f"{name}={value!r} stands between recursions and needs num_recursions of at least "
                f"2, not {config.num_recursions}; use {plain!r}"
            )
        if config.interleaved:
            raise ConfigError(
                f"{name}={value!r} stands between passes of the whole block; sharing="
                f"{config.sharing!r} repeats single layers: use 'cycle' or 'middle_cycle'"
            )


def _check_exits(config: Fields) -> None:
    weights, exits = config.exit_loss_weights, config.num_recursions - 1
    if weights is None:
        return
    if not isinstance(weights, (list, tuple)) or len(weights) != exits:
        raise ConfigError(
            f"exit_loss_weights={weights!r} must be a list of {exits} weights, one for each exit "
            f"before the last of num_recursions={config.num_recursions}, whose weight is 1"
        )
    for weight in weights:
        _real("exit_loss_weights", weight, 0)
    if config.interleaved and any(weights):
        raise ConfigError(
            f"exit_loss_weights={weights} needs passes of the whole block; sharing="
            f"{config.sharing!r} repeats single layers: use 'cycle' or 'middle_cycle'"
        )


def _check_router(config: Fields) -> None:
    depths, capacities = config.num_recursions, config.router_capacities
    if config.is_routed and depths < 2:
        raise ConfigError(
            f"router={config.router!r} chooses between depths and needs num_recursions of at "
            f"least 2, not {depths}; use router='fixed' for one recursion"
        )
    if not isinstance(capacities, list) or any(type(c) is not float for c in capacities):
        raise ConfigError(
            f"router_capacities={capacities!r} must be a list of {depths} numbers, one for each "
            "depth"
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
    if fixed is not None and (not isinstance(fixed, int) or not 1 <= fixed <= depths):
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
    _real("router_gate_bias", config.router_gate_bias)
    if config.router_init_bias is not None:
        _real("router_init_bias", config.router_init_bias)
    if config.router_gate_bias and config.router_activation == "softmax":
        raise ConfigError(
            f"router_gate_bias={config.router_gate_bias} does nothing under "
            "router_activation='softmax'; use 'sigmoid' or leave it at 0"
        )
    momentum = config.router_boundary_momentum
    if not isinstance(momentum, int | float) or not 0 <= momentum < 1:
        raise ConfigError(f"router_boundary_momentum={momentum!r} must lie in [0, 1)")
