"""Which names a configuration may hold. ``PretrainedConfig`` takes any and keeps it unread.

A misspelt field would then be a field more, and the network another one than was asked for.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from transformers import PretrainedConfig

from mor.config.fields import field_names
from mor.errors import ConfigError, nearest

# What Transformers puts into a config.json or reads from one, in any version of the allowed range,
# beside the fields that PretrainedConfig declares. A name that begins with _ is its own, too.
_OF_TRANSFORMERS = frozenset(field.name for field in fields(PretrainedConfig)) | {
    *("attn_implementation", "auto_map", "experts_implementation", "model_type", "name_or_path"),
    *("num_labels", "output_attentions", "output_router_logits", "quantization_config"),
    *("task_specific_params", "tokenizer_class", "torch_dtype"),
}
# Fields of Llama's relatives with the only values that the network computes.
_FIXED = {
    "attention_dropout": (0, None),
    "hidden_act": ("silu",),
    "output_attentions": (False, None),
    "partial_rotary_factor": (1, None),
    "per_layer_config": (None,),
    "pretraining_tp": (1, None),
    "sliding_window": (None,),
    "use_sliding_window": (False, None),
}
_ROPE = {"rope_type", "rope_theta"}
_ROPE_SCALES = {"factor", "original_max_position_embeddings"}
_ROPE_KEYS = {
    "default": _ROPE,
    "linear": _ROPE | {"factor"},
    "llama3": _ROPE | _ROPE_SCALES | {"low_freq_factor", "high_freq_factor"},
    "yarn": _ROPE
    | _ROPE_SCALES
    | {"attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"},
}


def take_extra(kind: type, extra: Mapping[str, Any]) -> dict[str, Any]:
    """What Transformers is to get of ``extra``, the arguments that are no fields of ours.

    Raises:
        ConfigError: an unknown name, or another architecture's field with a value that matters.
    """
    kept = {}
    for name, value in extra.items():
        if name in _FIXED:
            if value not in _FIXED[name]:
                only = _FIXED[name][0]
                raise ConfigError(
                    f"{name}={value!r} is not supported; use {only!r} or leave it out"
                )
        elif name in _OF_TRANSFORMERS or name.startswith("_"):
            kept[name] = value
        else:
            raise ConfigError(_unknown(name, kind))
    return kept


def refuse_near_misses(kind: type, names: Mapping[str, Any]) -> None:
    """Refuse what reads like one of our fields and is none.

    ``from_pretrained`` gets arguments for the configuration, the model, the tokenizer and the hub
    in one, so a name that is like none of our fields is somebody else's.

    Raises:
        ConfigError: naming the misspelt field.
    """
    for name in names:
        if not name.startswith("_") and nearest(name, field_names(), 0.85):
            raise ConfigError(_unknown(name, kind))


def _unknown(name: str, kind: type) -> str:
    near = nearest(name, field_names())
    if near:
        return f"{name} is no field of {kind.__name__}; did you mean {near!r}?"
    return (
        f"{name} is no field of {kind.__name__}; the fields are: {', '.join(field_names())}. "
        "If it comes from a config.json, a newer version may have written it: upgrade mor, or "
        "remove the field if it says nothing about the network"
    )


def rope_of(given: Any, scaling: Any, theta: float) -> dict[str, Any]:
    """``rope_parameters``, whichever of Transformers' spellings they came in.

    Args:
        given: ``rope_parameters`` or None.
        scaling: ``rope_scaling``, its older name, or None.
        theta: ``rope_theta`` where the dictionary has none.

    Raises:
        ConfigError: both are given, neither is a dictionary, or a key means nothing to its type.
    """
    if given and scaling and given != scaling:
        raise ConfigError(
            f"rope_parameters={given} and rope_scaling={scaling} are one field; give one of them"
        )
    found = given or scaling or {}
    if not isinstance(found, Mapping):
        raise ConfigError(f"rope_parameters={found!r} must be a dictionary")
    found = dict(found)
    older = found.pop("type", None)
    if found.get("partial_rotary_factor") in (None, 1):
        found.pop("partial_rotary_factor", None)
    found = {"rope_type": older or "default", "rope_theta": theta} | found
    known = _ROPE_KEYS.get(found["rope_type"], set(found))
    for key in found:
        if key not in known:
            raise ConfigError(
                f"rope_parameters[{key!r}]={found[key]!r} means nothing to rope_type="
                f"{found['rope_type']!r}; its keys are: {', '.join(sorted(known))}"
            )
    return found
