"""Configurations of Llama and its relatives read as ours, as vanilla models.

The relatives here are those whose layers are Llama's, but for biases and norms of query and key.
"""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
)

from mor.config import MoRConfig
from mor.config.rules import ROPE_TYPES
from mor.folder.weights import ConversionError, one_line

REQUIRED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
)
# What reads the configuration, so that each family's own defaults count, and what of the network
# its model class fixes without a field.
FAMILIES: dict[str, tuple[type[PretrainedConfig], dict[str, Any]]] = {
    "llama": (LlamaConfig, {}),
    "mistral": (MistralConfig, {"attention_bias": False, "mlp_bias": False}),
    "qwen2": (
        Qwen2Config,
        {"attention_bias": True, "attention_out_bias": False, "mlp_bias": False},
    ),
    "qwen3": (Qwen3Config, {"mlp_bias": False, "use_qk_norm": True}),
    "smollm3": (SmolLM3Config, {}),
}
# Fields of Llama's relatives that change the network, with the value at which they do nothing.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", None),
    "attention_dropout": (0, None),
    "quantization_config": (None,),
    "partial_rotary_factor": (1, None),
    "use_parallel_residual": (False, None),
    "parallel_attn": (False, None),
    "num_experts": (0, None),
    "num_local_experts": (0, None),
    "n_routed_experts": (0, None),
    "logit_scale": (1, None),
    "final_logit_softcapping": (None,),
    "attn_logit_softcapping": (None,),
}


def llama_fields(raw: dict[str, Any], where: str) -> dict[str, Any]:
    """The fields of :class:`MoRConfig` that a configuration decides; depth is left out.

    Args:
        raw: a ``config.json`` of Llama or a relative (:data:`FAMILIES`), of any Transformers
            version.
        where: what to call it in messages.

    Raises:
        ConversionError: naming a field that is missing, wrong, or not Llama-like.
    """
    kind = raw.get("model_type") or "llama"
    if kind not in FAMILIES:
        raise ConversionError(
            f"{where}: model_type={kind!r} does not fit; only {', '.join(FAMILIES)} can be "
            "converted"
        )
    family, fixed = FAMILIES[kind]
    for name in REQUIRED:
        value = raw.get(name)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            found = "is missing" if value is None else f"is {value!r}"
            raise ConversionError(f"{where}: {name} {found}; it must be a whole number above 0")
    for name, allowed in NEUTRAL.items():
        if raw.get(name) not in allowed:
            raise ConversionError(
                f"{where}: {name}={raw[name]!r} does not fit; only {allowed[0]!r} can be converted"
            )
    try:
        # Transformers knows every older spelling (rope_theta, rope_scaling, type).
        llama: Any = family.from_dict(copy.deepcopy(raw))
    except Exception as error:
        raise ConversionError(f"{where}: not a {kind} configuration: {one_line(error)}") from error
    _check_windows(raw, llama, where)
    rope = dict(llama.rope_parameters or {})
    rope.pop("type", None)
    if rope.get("rope_type") not in ROPE_TYPES or rope.get("partial_rotary_factor", 1) != 1:
        raise ConversionError(
            f"{where}: rope_parameters={rope} does not fit; rope_type must be one of "
            f"{', '.join(ROPE_TYPES)}, over whole heads"
        )
    pad = llama.pad_token_id
    if pad is not None and not -llama.vocab_size <= pad < llama.vocab_size:
        raise ConversionError(
            f"{where}: pad_token_id={pad} must be below vocab_size={llama.vocab_size}"
        )
    names = (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_attention_heads",
        "num_key_value_heads",
        "max_position_embeddings",
        "rms_norm_eps",
        "initializer_range",
        "tie_word_embeddings",
        "pad_token_id",
        "bos_token_id",
        "eos_token_id",
    )
    fields = {name: getattr(llama, name) for name in names} | {"rope_parameters": rope}
    # A pad token that no sequence has (older files write -1) is none.
    fields["pad_token_id"] = None if pad is not None and pad < 0 else pad
    fields["head_dim"] = getattr(llama, "head_dim", None)
    biases = {name: bool(getattr(llama, name, False)) for name in ("attention_bias", "mlp_bias")}
    return fields | biases | fixed


def _check_windows(raw: dict[str, Any], config: Any, where: str) -> None:
    """Every layer must see all that came before, and know where it stands."""
    window, limit = getattr(config, "sliding_window", None), config.max_position_embeddings
    # Qwen and SmolLM3 name a window that only some layers use, or none.
    if "use_sliding_window" in raw or hasattr(config, "use_sliding_window"):
        kinds = getattr(config, "layer_types", None) or []
        used = any(kind != "full_attention" for kind in kinds)
    else:
        window = raw.get("sliding_window", window)
        used = window is not None
    if used and (window is None or window < limit):
        raise ConversionError(
            f"{where}: sliding_window={window} does not fit; only attention over all of "
            f"max_position_embeddings={limit} can be converted"
        )
    rotated = getattr(config, "no_rope_layers", None) or []
    if not all(rotated):
        raise ConversionError(
            f"{where}: no_rope_layers leaves {rotated.count(0)} layers without rotary positions; "
            "only a model that rotates in every layer can be converted"
        )


def plain_depth(num_layers: int) -> dict[str, Any]:
    """The depth fields of a vanilla model: 1 + (L - 2) + 1, or one block where L < 3.

    With a layer of its own at both ends, its weights line up with those of a ``middle_*`` model.
    """
    middle = num_layers >= 3
    return {
        "num_recursions": 1,
        "num_recursion_layers": num_layers - 2 * middle,
        "num_prelude_layers": int(middle),
        "num_coda_layers": int(middle),
        "sharing": "middle_cycle" if middle else "cycle",
    }


def has_own_head(weights: dict[str, Tensor], source: Path) -> bool:
    """Whether the weights hold a head unlike the embedding; warns, as it is then kept untied."""
    head, embedding = weights.get("lm_head.weight"), weights.get("model.embed_tokens.weight")
    if head is None or embedding is None or torch.equal(head, embedding):
        return False
    warnings.warn(
        f"{source}: tie_word_embeddings is true, but lm_head.weight differs from "
        "model.embed_tokens.weight: both are kept, untied",
        stacklevel=3,
    )
    return True


def llama_config(raw: dict[str, Any], where: str) -> MoRConfig:
    """The vanilla model that a configuration of Llama or a relative describes.

    Raises:
        ConversionError: as :func:`llama_fields`.
    """
    fields = llama_fields(raw, where)
    return MoRConfig(**fields, **plain_depth(raw["num_hidden_layers"]), router="fixed")
