"""A model of fixed depth as a GGUF file, for llama.cpp and what is built on it.

First a Llama (:mod:`mor.hf.export.llama`), then its tensors under llama.cpp's names. The rows of
Llama's query and key projections are turned, so that the two numbers of a rotated pair are
neighbours; :mod:`mor.hf.convert.gguf` turns them back.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from mor.config import MoRConfig
from mor.disk import check_new, replace_file
from mor.errors import MorError, missing_package
from mor.hf.convert.gguf import ARCHITECTURES, LAYER_NAMES, NAMES
from mor.hf.export.gguf_tokenizer import write_tokenizer
from mor.hf.export.llama import as_llama
from mor.hf.load import load_model
from mor.run_files import model_folder

_FILE_TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 32}
_PLAIN_YARN = {"rope_type", "rope_theta", "factor", "original_max_position_embeddings"}
_LAYERS = {ours: theirs for theirs, ours in LAYER_NAMES.items()}
_OTHERS = {ours: theirs for theirs, ours in NAMES.items()}


def export_gguf(
    folder: Path, out: Path, depth: int | None = None, dtype: torch.dtype = torch.float32
) -> Path:
    """Write a model folder as one GGUF file, tokenizer and chat template included.

    Args:
        folder: a model folder, or a finished run's folder.
        out: a new file.
        depth: recursions of every token; default the model's own.
        dtype: of the matrices: float32, float16 or bfloat16; vectors are float32.

    Returns:
        ``out``.

    Raises:
        MorError: no model there, one that Llama cannot express, a tokenizer that the format cannot
            hold, ``out`` exists, or the ``gguf`` package is not installed.
    """
    try:
        import gguf
    except ImportError:
        raise missing_package("writing GGUF needs", "gguf", "gguf") from None
    check_new(out)
    source = model_folder(folder)
    model = load_model(source)
    made: Any = as_llama(model, depth)
    architecture = "qwen3" if model.config.use_qk_norm else "llama"
    try:
        with replace_file(out) as target:
            writer = gguf.GGUFWriter(target, architecture)
            _write_fields(writer, gguf, made.config, model.config, source.name, dtype)
            write_tokenizer(writer, source, model.config.vocab_size)
            _write_token_ids(writer, model.config)
            _write_tensors(writer, gguf, made, architecture, dtype)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
            writer.close()
    except OSError as error:
        raise MorError(f"{out}: cannot write: {error.strerror or error}") from error
    return out


def _write_fields(
    writer: Any, gguf: Any, llama: Any, config: MoRConfig, name: str, dtype: torch.dtype
) -> None:
    """What the architecture is made of."""
    writer.add_name(name)
    writer.add_file_type(_FILE_TYPES[dtype])
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(llama.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    rope = dict(config.rope_parameters)
    writer.add_rope_freq_base(float(rope["rope_theta"]))
    kind = rope["rope_type"]
    if kind == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(rope["factor"]))
    elif kind == "yarn":
        more = {key for key, value in rope.items() if value is not None} - _PLAIN_YARN
        if more:
            raise MorError(f"rope_parameters: yarn with {', '.join(sorted(more))} is not written")
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(float(rope["factor"]))
        before = rope.get("original_max_position_embeddings") or config.max_position_embeddings
        writer.add_rope_scaling_orig_ctx_len(int(before))


def _write_token_ids(writer: Any, config: MoRConfig) -> None:
    """Special tokens, and whether texts begin with BOS."""
    ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    if config.bos_token_id is not None:
        writer.add_bos_token_id(config.bos_token_id)
    if ends and ends[0] is not None:
        writer.add_eos_token_id(ends[0])
    if len(ends) > 1:
        writer.add_eot_token_id(ends[1])
    if config.pad_token_id is not None:
        writer.add_pad_token_id(config.pad_token_id)
    writer.add_add_bos_token(bool(config.add_bos_token))


def _write_tensors(
    writer: Any, gguf: Any, made: Any, architecture: str, dtype: torch.dtype
) -> None:
    config = made.config
    kinds = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
    for name, tensor in made.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        stored = _OTHERS.get(name)
        if stored is None:
            _, _, number, *middle, last = name.split(".")
            stored = f"blk.{number}.{_LAYERS['.'.join(middle)]}.{last}"
            turned = (".q_proj" in name or ".k_proj" in name) and ARCHITECTURES[architecture]
            tensor = turn(tensor, config.head_dim) if turned else tensor
        values = tensor.detach().float().contiguous().numpy()
        kind = gguf.GGMLQuantizationType["F32" if tensor.dim() == 1 else kinds[dtype]]
        if kind.name != "F32":
            values = gguf.quants.quantize(values, kind)
        writer.add_tensor(stored, values, raw_dtype=kind)
    if config.rope_parameters["rope_type"] == "llama3":
        writer.add_tensor("rope_freqs.weight", llama3_factors(config).numpy())


def turn(rows: Tensor, head_dim: int) -> Tensor:
    """Rows of q or k [H d, ...] with each head's pairs (0, d/2), (1, d/2 + 1), ... together."""
    heads = rows.view(-1, 2, head_dim // 2, *rows.shape[1:])
    return heads.transpose(1, 2).reshape(rows.shape)


def llama3_factors(config: Any) -> Tensor:
    """[d / 2] what each of RoPE's frequencies is divided by under Llama 3's scaling."""
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    steps = torch.arange(0, config.head_dim, 2, dtype=torch.float64) / config.head_dim
    plain = 1.0 / config.rope_parameters["rope_theta"] ** steps
    return (plain / scaled.double()).float()
