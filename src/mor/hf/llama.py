"""Llama configurations read as ours, and Hugging Face Llama folders as vanilla models."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig

from mor.config import ROPE_TYPES, MoRConfig
from mor.hf.files import ConversionError, one_line

REQUIRED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
)
# Fields of Llama's relatives that change the network, with the value at which they do nothing.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "model_type": ("llama", None),
    "hidden_act": ("silu", None),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "sliding_window": (None,),
    "attention_dropout": (0, None),
    "quantization_config": (None,),
    "partial_rotary_factor": (1, None),
}


def llama_fields(raw: dict[str, Any], where: str) -> dict[str, Any]:
    """The fields of :class:`MoRConfig` that a Llama configuration decides; depth is left out.

    Args:
        raw: a Llama ``config.json``, of any Transformers version.
        where: what to call it in messages.

    Raises:
        ConversionError: naming a field that is missing, wrong, or not of a plain Llama.
    """
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
        llama = LlamaConfig.from_dict(copy.deepcopy(raw))
    except Exception as error:
        raise ConversionError(f"{where}: not a Llama configuration: {one_line(error)}") from error
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
        "head_dim",
        "max_position_embeddings",
        "rms_norm_eps",
        "initializer_range",
        "tie_word_embeddings",
        "pad_token_id",
        "bos_token_id",
        "eos_token_id",
    )
    return {name: getattr(llama, name) for name in names} | {"rope_parameters": rope}


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


def head_apart(weights: dict[str, Tensor], source: Path) -> bool:
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
    """The vanilla model that a Llama configuration describes.

    Raises:
        ConversionError: as :func:`llama_fields`.
    """
    fields = llama_fields(raw, where)
    return MoRConfig(**fields, **plain_depth(raw["num_hidden_layers"]), router="fixed")
