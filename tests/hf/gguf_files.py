"""Tiny GGUF files, written as llama.cpp's converter would: turned rows, its names, quantised."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor
from transformers import LlamaConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

from mor.hf.convert.gguf import LAYER_NAMES, NAMES

ALPHABET = [chr(c) for c in (*range(33, 127), *range(161, 173), *range(174, 256))]
# Bytes that print as nothing have letters from 256 on (GPT-2's byte-level alphabet).
ALPHABET += [chr(256 + i) for i in range(68)]
MERGES = ["t h", "th e", "Ġ a", "i n", "Ġ the", "ĠĠ ĠĠ", "Ġ Ġ"]
SPECIAL = ["<|end|>", "<|turn|>"]
TOKENS = [*SPECIAL, *ALPHABET, *(merge.replace(" ", "") for merge in MERGES)]
VOCAB = 320
TEMPLATE = "{% for message in messages %}<|turn|>{{ message['content'] }}{% endfor %}"


def model_of(config_class: type = LlamaConfig, **changes: Any) -> PreTrainedModel:
    """A random model whose matrices have rows of a multiple of 32, as blocks need."""
    torch.manual_seed(0)
    shape: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "rope_parameters": {"rope_type": "default", "rope_theta": 5e4},
        "tie_word_embeddings": True,
    }
    model = AutoModelForCausalLM.from_config(config_class(**shape | changes)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.normal_(1.0, 0.3)
            else:
                parameter.normal_(0.0, 0.2)
    return model


def turn(rows: Tensor, heads: int) -> Tensor:
    """What llama.cpp's converter does to the rows of q and k."""
    return rows.view(heads, 2, -1, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)


def write_gguf(
    path: Path,
    model: PreTrainedModel,
    arch: str = "llama",
    kind: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
    tokens: list[str] = TOKENS,
    extra: dict[str, Tensor] | None = None,
    add_bos: bool | None = None,
    **fields: Any,
) -> Path:
    """Write ``model``; ``fields`` are added after the architecture's, or left out where None."""
    config: Any = model.config
    plain: dict[str, Any] = {
        "vocab_size": config.vocab_size,
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "rope.freq_base": float(config.rope_parameters["rope_theta"]),
    }
    if getattr(config, "head_dim", None):
        plain |= {
            "attention.key_length": config.head_dim,
            "attention.value_length": config.head_dim,
        }
    pre = fields.pop("pre", "smollm")
    writer = gguf.GGUFWriter(path, arch)
    for name, value in (plain | {n.replace("__", "."): v for n, v in fields.items()}).items():
        if isinstance(value, int):
            writer.add_uint32(f"{arch}.{name}", value)
        elif isinstance(value, float):
            writer.add_float32(f"{arch}.{name}", value)
        elif isinstance(value, str):
            writer.add_string(f"{arch}.{name}", value)
    if tokens:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(pre)
        writer.add_token_list(tokens)
        writer.add_token_types([3] * len(SPECIAL) + [1] * (len(tokens) - len(SPECIAL)))
        writer.add_token_merges(MERGES)
        writer.add_bos_token_id(0)
        writer.add_eos_token_id(0)
        writer.add_eot_token_id(1)
        if add_bos is not None:
            writer.add_add_bos_token(add_bos)
        writer.add_chat_template(TEMPLATE)
    theirs = {ours: name for name, ours in NAMES.items()}
    layers = {ours: name for name, ours in LAYER_NAMES.items()}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        stored = theirs.get(name)
        if stored is None:
            _, _, number, *middle, last = name.split(".")
            stored = f"blk.{number}.{layers['.'.join(middle)]}.{last}"
            if arch == "llama" and (".q_proj" in name or ".k_proj" in name):
                heads = "num_attention_heads" if ".q_proj" in name else "num_key_value_heads"
                tensor = turn(tensor, getattr(config, heads))
        _add(writer, stored, tensor, kind)
    for name, tensor in (extra or {}).items():
        _add(writer, name, tensor, gguf.GGMLQuantizationType.F32)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add(writer: Any, name: str, tensor: Tensor, kind: gguf.GGMLQuantizationType) -> None:
    values = np.ascontiguousarray(tensor.numpy())
    if tensor.dim() == 1 or kind == gguf.GGMLQuantizationType.F32:
        writer.add_tensor(name, values)
        return
    writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)
