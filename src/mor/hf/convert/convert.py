"""``mor convert``: foreign checkpoints written as folders that ``from_pretrained`` loads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from mor.disk import check_new
from mor.errors import describe_missing
from mor.folder.weights import ConversionError, find_weights, read_mapping, read_weights
from mor.hf.bos import save_tokenizer, set_bos
from mor.hf.convert.assemble import assemble, stack_plan
from mor.hf.convert.authors import authors_config, authors_plan, drop_unused
from mor.hf.convert.files import new_folder
from mor.hf.convert.gguf import GGUFFile, gguf_config, gguf_weights
from mor.hf.convert.gguf_tokenizer import gguf_bos, gguf_tokenizer
from mor.hf.convert.llama import has_own_head, llama_config
from mor.hf.convert.write import write_model
from mor.run_files import refuse_adapter


def convert_authors(weights: str | Path, config: str | Path, out: str | Path) -> Path:
    """Write a checkpoint of the paper's authors as a folder of ours.

    All their families: vanilla, recursive, expert choice and token choice, with KV sharing, norms
    apart, auxiliary routers. Only names that start as the network's are read; recorded activations
    and optimizer state beside them are not. float16, which their code does not train in, is widened
    to float32; other dtypes stay. ``decide`` starts from the paper's 0.5 rule, until a calibration
    or more training finds the boundaries.

    Args:
        weights: their ``.safetensors`` or ``.bin`` (loaded as weights only), or a folder of it.
        config: JSON or YAML with the sections ``recursive``, ``kv_sharing``, ``mor``, and
            ``hf_config``, for which the ``config.json`` beside the weights may stand in.
        out: a new or empty folder.

    Returns:
        ``out``.

    Raises:
        MorError: naming the file, field or tensor that is wrong. Nothing is written then.
    """
    weights, config, out = Path(weights), Path(config), Path(out)
    check_new(out)
    raw = read_mapping(config)
    file = find_weights(weights)
    llama, where = _llama_section(raw, config, file)
    parsed = authors_config(raw, llama, where)
    tensors = drop_unused(parsed, read_weights(file))
    # Their recursive class never ties the head, whatever the configuration says.
    if parsed.family == "recursive" and parsed.tie_word_embeddings:
        parsed.tie_word_embeddings = not has_own_head(tensors, file)
    model = assemble(parsed, authors_plan(parsed), tensors, file)
    if model.dtype == torch.float16:
        model.float()
    return write_model(model, file.parent, out)


def convert_llama(source: str | Path, out: str | Path) -> Path:
    """Write a Hugging Face folder of Llama or a relative as a vanilla model, in the same dtype.

    Relatives are Mistral, Qwen2, Qwen3 and SmolLM3, as far as their layers are Llama's but for
    biases and norms of query and key. Weights may be whole or sharded, ``.safetensors`` or
    ``.bin``, the head tied or not, RoPE of type default, linear, llama3 or yarn. Tokenizer and
    generation settings are copied along.

    Args:
        source: the folder.
        out: a new or empty folder.

    Returns:
        ``out``.

    Raises:
        MorError: naming the file, field or tensor that does not fit. Nothing is written then.
    """
    source, out = Path(source), Path(out)
    check_new(out)
    if not source.is_dir():
        raise ConversionError(f"{source} {describe_missing(source)}")
    refuse_adapter(source)
    where = source / "config.json"
    config = llama_config(read_mapping(where), str(where))
    tensors = read_weights(source)
    if config.tie_word_embeddings:
        config.tie_word_embeddings = not has_own_head(tensors, source)
    return write_model(assemble(config, stack_plan(config), tensors, source), source, out)


def convert_gguf(source: str | Path, out: str | Path, dtype: torch.dtype = torch.float32) -> Path:
    """Write a GGUF file of a Llama-like model as a vanilla model of ours, de-quantised.

    The tokenizer and its chat template are written along.

    Args:
        source: the file.
        out: a new or empty folder.
        dtype: of the weights written.

    Returns:
        ``out``.

    Raises:
        MorError: naming the file, field or tensor that does not fit. Nothing is written then.
    """
    source, out = Path(source), Path(out)
    check_new(out)
    file = GGUFFile(source)
    config = gguf_config(file)
    tokenizer = gguf_tokenizer(file, config.vocab_size)
    weights = gguf_weights(file, config, dtype)
    model = assemble(config, stack_plan(config), weights, source)
    if tokenizer is not None:
        set_bos(model, gguf_bos(file, tokenizer))
    with new_folder(out) as folder:
        model.save_pretrained(folder)
        if tokenizer is not None:
            save_tokenizer(tokenizer, model.config, folder)
    return out


def _llama_section(raw: dict[str, Any], config: Path, weights: Path) -> tuple[dict[str, Any], str]:
    """Their Llama configuration, and the name of where it was found."""
    inner = raw.get("hf_config")
    if isinstance(inner, dict):
        return inner, f"{config}"
    if inner is not None:
        raise ConversionError(f"{config}: hf_config={inner!r} must be a section of fields")
    if "hidden_size" in raw:
        return raw, f"{config}"
    beside = weights.parent / "config.json"
    if not beside.is_file():
        raise ConversionError(
            f"{config}: hf_config is missing, and there is no config.json beside {weights}"
        )
    return read_mapping(beside), f"{config} with {beside}"
