"""GGUF files (llama.cpp's format) of Llama-like models, read as vanilla models of ours.

The ``gguf`` library reads the file and undoes its quantisation; what is left to us is names. Its
writer turns the rows of Llama's query and key projections, so that the two numbers of a rotated
pair are neighbours; they are turned back here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from mor.config import MoRConfig
from mor.errors import describe_missing, install_hint
from mor.folder.weights import ConversionError, one_line
from mor.hf.convert.llama import llama_fields, plain_depth
from mor.ops.alignment import aligned

# Architecture names of the format that are Llama-like, and whether q and k rows were turned.
ARCHITECTURES = {"llama": True, "qwen2": False, "qwen3": False, "smollm3": True}
NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


class GGUFFile:
    """One file: its fields by name, and its tensors.

    Raises:
        ConversionError: no such file, not GGUF or cut short, or the library is not installed.
    """

    def __init__(self, path: Path) -> None:
        try:
            import gguf
        except ImportError:
            raise ConversionError(
                "reading GGUF needs the package gguf, which is not installed: "
                + install_hint("gguf")
            ) from None
        if not path.is_file():
            raise ConversionError(f"{path} {describe_missing(path, 'file')}")
        self.path, self._library = path, gguf
        try:
            reader = gguf.GGUFReader(path)
            self.tensors = {tensor.name: tensor for tensor in reader.tensors}
            self._fields = reader.fields
        except Exception as error:  # the reader raises whatever a broken file happens to cause
            raise ConversionError(
                f"{path}: cut short or not a GGUF file: {one_line(error)[:200]}"
            ) from error
        self.architecture = str(self.field("general.architecture"))

    def field(self, name: str, default: Any = None) -> Any:
        """Value of a metadata field."""
        found = self._fields.get(name)
        return default if found is None else found.contents()

    def of_model(self, name: str, default: Any = None) -> Any:
        """Value of a field whose name begins with the architecture's."""
        return self.field(f"{self.architecture}.{name}", default)

    def tensor(self, name: str) -> Tensor:
        """Tensor ``name``, de-quantised, float32.

        Raises:
            ConversionError: a quantisation that the library cannot undo.
        """
        stored = self.tensors[name]
        try:
            values = self._library.quants.dequantize(stored.data, stored.tensor_type)
        except Exception as error:  # NotImplementedError, or shapes that do not fit the type
            raise ConversionError(
                f"{self.path}: {name} of type {stored.tensor_type.name} cannot be de-quantised: "
                f"{one_line(error)}"
            ) from error
        return aligned(torch.from_numpy(np.array(values, dtype=np.float32)))


def gguf_config(file: GGUFFile) -> MoRConfig:
    """The vanilla model that the file's metadata and tensors describe.

    Raises:
        ConversionError: naming what is missing or not Llama-like.
    """
    where, kind = str(file.path), file.architecture
    if (parts := file.field("split.count", 1)) > 1:
        raise ConversionError(
            f"{where}: is one of {parts} parts; merge them first (llama-gguf-split --merge)"
        )
    if kind not in ARCHITECTURES:
        raise ConversionError(
            f"{where}: general.architecture={kind!r} does not fit; only "
            f"{', '.join(ARCHITECTURES)} can be converted"
        )
    heads = file.of_model("attention.head_count")
    raw: dict[str, Any] = {
        "model_type": kind,
        "num_hidden_layers": file.of_model("block_count"),
        "hidden_size": file.of_model("embedding_length"),
        "intermediate_size": file.of_model("feed_forward_length"),
        "num_attention_heads": heads,
        "num_key_value_heads": file.of_model("attention.head_count_kv", heads),
        "max_position_embeddings": file.of_model("context_length"),
        "rms_norm_eps": file.of_model("attention.layer_norm_rms_epsilon"),
        "num_experts": file.of_model("expert_count", 0),
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "vocab_size": _vocab_size(file),
    }
    for name in ("max_position_embeddings", "rms_norm_eps"):
        if not isinstance(raw[name], (int, float)):
            raise ConversionError(f"{where}: the field for {name} is missing")
    if not isinstance(raw["num_key_value_heads"], int):
        raise ConversionError(
            f"{where}: attention.head_count_kv={raw['num_key_value_heads']} differs by layer; only "
            "one number for all layers can be converted"
        )
    if kind == "llama" and file.of_model("attention.sliding_window"):
        raw["sliding_window"] = file.of_model("attention.sliding_window")
    raw |= _token_ids(file)
    if isinstance(heads, int) and isinstance(raw["hidden_size"], int) and heads > 0:
        raw["head_dim"] = _head_dim(file, raw["hidden_size"] // heads)
        raw["rope_parameters"] = _rope(file, raw)
    fields = llama_fields(raw, where)
    fields |= {
        "head_dim": raw["head_dim"],
        "attention_bias": "blk.0.attn_q.bias" in file.tensors,
        "attention_out_bias": "blk.0.attn_output.bias" in file.tensors,
        "mlp_bias": "blk.0.ffn_up.bias" in file.tensors,
        "use_qk_norm": "blk.0.attn_q_norm.weight" in file.tensors,
    }
    return MoRConfig(**fields, **plain_depth(raw["num_hidden_layers"]), router="fixed")


def _vocab_size(file: GGUFFile) -> int | None:
    """Rows of the embedding."""
    table = file.tensors.get("token_embd.weight")
    if table is None:
        raise ConversionError(f"{file.path}: token_embd.weight is missing")
    return int(table.shape[-1])


def _token_ids(file: GGUFFile) -> dict[str, Any]:
    ids = {
        f"{ours}_token_id": file.field(f"tokenizer.ggml.{theirs}_token_id")
        for ours, theirs in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"))
    }
    # A chat turn may end with a token of its own.
    turn = file.field("tokenizer.ggml.eot_token_id")
    if turn is not None and turn != ids["eos_token_id"]:
        ids["eos_token_id"] = [i for i in (ids["eos_token_id"], turn) if i is not None]
    return ids


def _head_dim(file: GGUFFile, default: int) -> int:
    head = int(file.of_model("attention.key_length", default))
    for name in ("attention.value_length", "rope.dimension_count"):
        if (found := file.of_model(name, head)) != head:
            raise ConversionError(
                f"{file.path}: {name}={found} does not fit; heads of {head} numbers are read and "
                "rotated whole"
            )
    return head


def _rope(file: GGUFFile, raw: Mapping[str, Any]) -> dict[str, Any]:
    """Rotary parameters under Transformers' names."""
    rope = {"rope_type": "default", "rope_theta": float(file.of_model("rope.freq_base", 10000.0))}
    kind = file.of_model("rope.scaling.type", "none")
    if kind not in ("none", "linear", "yarn"):
        raise ConversionError(
            f"{file.path}: rope.scaling.type={kind!r} is not known; use none, linear or yarn"
        )
    if kind != "none":
        rope |= {"rope_type": kind, "factor": float(file.of_model("rope.scaling.factor", 1.0))}
    if kind == "yarn":
        before = file.of_model("rope.scaling.original_context_length")
        if before is not None:
            rope["original_max_position_embeddings"] = before
    if "rope_freqs.weight" in file.tensors:
        return _llama3_rope(file, rope, raw)
    return rope


def _llama3_rope(file: GGUFFile, rope: dict[str, Any], raw: Mapping[str, Any]) -> dict[str, Any]:
    """Llama 3's scaling, which the format stores as the factors that come of it.

    Raises:
        ConversionError: the factors are of another scaling.
    """
    factors = file.tensor("rope_freqs.weight").double()
    scaled = rope | {
        "rope_type": "llama3",
        "factor": float(factors.max()),
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    fields = {name: raw[name] for name in ("hidden_size", "num_attention_heads", "head_dim")}
    config = MoRConfig(**fields, rope_parameters=scaled)
    found, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    steps = torch.arange(0, raw["head_dim"], 2, dtype=torch.float64) / raw["head_dim"]
    expected = 1.0 / rope["rope_theta"] ** steps / factors
    if not torch.allclose(found.double(), expected, rtol=1e-3, atol=0):
        raise ConversionError(
            f"{file.path}: rope_freqs.weight holds another scaling than Llama 3's; it cannot be "
            "converted"
        )
    return scaled


def gguf_weights(file: GGUFFile, config: MoRConfig, dtype: torch.dtype) -> dict[str, Tensor]:
    """All tensors under Transformers' names, de-quantised, in ``dtype``.

    Raises:
        ConversionError: a tensor that a Llama-like model does not have.
    """
    turned = ARCHITECTURES[file.architecture]
    weights = {}
    for name in file.tensors:
        if name == "rope_freqs.weight":
            continue
        tensor = file.tensor(name)
        if turned and re.fullmatch(r"blk\.\d+\.attn_[qk]\.(weight|bias)", name):
            tensor = turn_back(tensor, config.head_dim)
        weights[_our_name(name, file.path)] = tensor.to(dtype)
    return weights


def _our_name(name: str, path: Path) -> str:
    found = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name)
    if name in NAMES:
        return NAMES[name]
    if found and found[2] in LAYER_NAMES:
        return f"model.layers.{found[1]}.{LAYER_NAMES[found[2]]}.{found[3]}"
    raise ConversionError(
        f"{path}: holds the tensor {name}, which a Llama-like model does not have"
    )


def turn_back(rows: Tensor, head_dim: int) -> Tensor:
    """Rows of q or k [H d, ...] with each head's pairs (0, d/2), (1, d/2 + 1), ... taken apart."""
    heads = rows.view(-1, head_dim // 2, 2, *rows.shape[1:])
    return heads.transpose(1, 2).reshape(rows.shape)
