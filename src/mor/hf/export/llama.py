"""A model of fixed depth as a plain Llama: its layers written out in the order they run.

What a shared layer does differently at each use (norms kept apart, low-rank maps, gains) is worked
into the copy for that use. What Llama has no place for is refused.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, Qwen3Config
from transformers.models.qwen3 import Qwen3ForCausalLM

from mor.config import MoRConfig
from mor.errors import MorError
from mor.folder.config import load_config
from mor.hf.convert.assemble import layer_tensors
from mor.hf.convert.files import check_tokenizer, copy_companions, new_folder
from mor.hf.load import load_model
from mor.hf.modeling import MoRForCausalLM
from mor.model.layers import DecoderLayer
from mor.model.relaxation import LINEAR_MAPS, short
from mor.run_files import model_folder

_COPIED = (
    "vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads",
    "head_dim", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings",
    "initializer_range", "pad_token_id", "bos_token_id", "eos_token_id",
)  # fmt: skip


def check_expressible(config: MoRConfig, depth: int) -> None:
    """Refuse what a Llama of ``depth`` recursions does not compute.

    Raises:
        MorError: naming the field, and why.
    """
    if config.is_routed:
        raise MorError(
            f"router={config.router!r} lets tokens differ in depth, and a Llama runs all layers "
            "for every token; its outputs would be another model's. Use `mor export hf`, or one "
            "with router='fixed'"
        )
    most = config.router_fixed_depth or config.num_recursions
    if not 1 <= depth <= most:
        raise MorError(f"depth={depth} must lie in 1..{most}, the recursions that the model runs")
    # What is there only from the second recursion on does not matter at depth 1.
    several = depth > 1
    reasons = {
        "recursion_seam": (
            config.recursion_seam != "none" and several,
            "mixes in the first stream",
        ),
        "recursion_scalars": (config.recursion_scalars, "scales what a recursion adds"),
        "recursion_scale": (config.recursion_scale != "none", "scales what a recursion adds"),
        "recursion_streams": (config.recursion_streams != 1, "carries several streams"),
        "relaxation": (config.relaxation == "embeddings", "adds a vector per depth to the stream"),
        "kv_sharing": (
            config.kv_sharing not in ("none", "propagate") and several,
            "lets later layers read the keys and values of earlier ones",
        ),
        "mlp_bias": (config.mlp_bias and config.use_qk_norm, "goes with no use_qk_norm there"),
        "image_token_id": (config.image_token_id is not None, "is the place of images"),
        "audio_token_id": (config.audio_token_id is not None, "is the place of sounds"),
    }
    for name, (wrong, why) in reasons.items():
        if wrong:
            raise MorError(
                f"{name}={getattr(config, name)!r} cannot be said in a Llama folder: it {why}; use "
                "`mor export hf`"
            )


def as_llama(model: MoRForCausalLM, depth: int | None = None) -> PreTrainedModel:
    """Transformers' Llama (Qwen3 with ``use_qk_norm``) that computes what ``model`` does.

    Args:
        model: of fixed depth, in the dtype that the copy is to have.
        depth: recursions of every token; default the model's own.

    Returns:
        In evaluation mode; weights that are used several times are copies.

    Raises:
        MorError: see :func:`check_expressible`.
    """
    config = model.config
    depth = depth or config.router_fixed_depth or config.num_recursions
    check_expressible(config, depth)
    kept = {name: getattr(config, name) for name in _COPIED}
    biased = config.attention_bias or config.attention_out_bias
    block = depth * config.num_recursion_layers
    kept |= {
        "num_hidden_layers": config.num_prelude_layers + block + config.num_coda_layers,
        "attention_bias": biased,
        "rope_parameters": dict(config.rope_parameters),
    }
    fresh: Any
    if config.use_qk_norm:
        fresh = Qwen3ForCausalLM(Qwen3Config(**kept))
    else:
        fresh = LlamaForCausalLM(LlamaConfig(**kept, mlp_bias=config.mlp_bias))
    fresh = fresh.to(model.dtype).eval()
    weights = _weights(model, block, biased)
    missing, unknown = fresh.load_state_dict(weights, strict=False)
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    lost = [*(set(missing) - tied), *unknown]
    if lost:
        raise MorError(f"the weights do not line up with Llama's: {sorted(lost)[:3]}")
    fresh.tie_weights()
    fresh.generation_config = model.generation_config
    return fresh


@torch.no_grad()
def _weights(model: MoRForCausalLM, block: int, biased: bool) -> dict[str, Tensor]:
    """Llama's tensors by its names."""
    core, config = model.model, model.config
    found = {
        "model.embed_tokens.weight": core.embed_tokens.weight,
        "model.norm.weight": core.norm.weight,
    }
    if not config.tie_word_embeddings:
        found["lm_head.weight"] = core.lm_head.weight
    shared = [
        (core.block[config.shared_layer(unrolled)], config.repetition(unrolled))
        for unrolled in range(block)
    ]
    order = [*((layer, 0) for layer in core.prelude_layers), *shared]
    order += [(layer, 0) for layer in core.coda_layers]
    for place, (layer, use) in enumerate(order):
        for name, tensor in _layer_at(layer, use, config, biased).items():
            found[f"model.layers.{place}.{name}"] = tensor
    return found


def _layer_at(layer: Any, use: int, config: MoRConfig, biased: bool) -> dict[str, Tensor]:
    """The tensors of one layer as it computes at ``use``, by their names within it."""
    assert isinstance(layer, DecoderLayer)
    found: dict[str, Tensor] = {}
    for name in layer_tensors(config):
        tensor: Any = layer.get_parameter(name)
        apart = name.endswith("norm.weight") and tensor.dim() == 2
        found[name] = tensor[use] if apart else tensor
    for half, names in LINEAR_MAPS.items():
        low_rank = getattr(layer, half).low_rank
        for name in names if low_rank is not None else ():
            beside = low_rank[short(name)]
            found[f"{half}.{name}.weight"] = found[f"{half}.{name}.weight"] + (
                beside.scale * (beside.up[use] @ beside.down[use])
            )
            if beside.bias is not None:
                found[f"{half}.{name}.bias"] = found[f"{half}.{name}.bias"] + beside.bias[use]
    for gain, name in (
        (layer.attention_gain, "self_attn.o_proj"),
        (layer.mlp_gain, "mlp.down_proj"),
    ):
        if gain is not None:
            factor = gain.weight[use]
            found[f"{name}.weight"] = found[f"{name}.weight"] * factor[:, None]
            if f"{name}.bias" in found:
                found[f"{name}.bias"] = found[f"{name}.bias"] * factor
    if biased:  # there it is all four maps or none
        for name in LINEAR_MAPS["self_attn"]:
            weight = found[f"self_attn.{name}.weight"]
            found.setdefault(f"self_attn.{name}.bias", weight.new_zeros(len(weight)))
    return found


def export_llama(
    folder: Path, out: Path, depth: int | None = None, dtype: torch.dtype | None = None
) -> Path:
    """Write a model folder as a plain Llama folder, tokenizer included.

    Args:
        folder: a model folder, or a finished run's folder.
        out: a new or empty folder.
        depth: recursions of every token; default the model's own.
        dtype: of the weights written; default those of the folder.

    Returns:
        ``out``.

    Raises:
        MorError: no model there, one that Llama cannot express, a damaged tokenizer, ``out`` is
            not empty.
    """
    source = model_folder(folder)
    made = as_llama(load_model(source, dtype or stored_dtype(source)), depth)
    with new_folder(out) as target:
        made.save_pretrained(target)
        copy_companions(source, target)
        check_tokenizer(target, made.config.vocab_size, source)
    return out


def stored_dtype(source: Path) -> torch.dtype:
    """The dtype of a folder's weights, as its configuration says; float32 where it does not."""
    found: Any = load_config(source).dtype
    return found if isinstance(found, torch.dtype) else torch.float32
