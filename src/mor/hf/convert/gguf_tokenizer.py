"""The tokenizer of a GGUF file, its chat template included, by way of Transformers."""

from __future__ import annotations

import warnings
from typing import Any

from tokenizers import pre_tokenizers
from transformers import AutoTokenizer

from mor.data.bos import Bos
from mor.folder.weights import ConversionError, one_line
from mor.hf.convert.gguf import GGUFFile

# How text is cut before the merges. Transformers knows these; the others it cuts as GPT-2 does.
KNOWN_CUTS = ("gpt-2", "llama-bpe", "llama3", "llama-v3", "qwen2", "deepseek-r1-qwen", "tekken")
# Texts begin with BOS where nothing else is said (llama.cpp, LLAMA_VOCAB_PRE_TYPE_LLAMA3).
BOS_CUTS = ("llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0")
# Each digit is a piece of its own, then GPT-2's rule (llama.cpp, LLAMA_VOCAB_PRE_TYPE_SMOLLM).
DIGIT_CUTS = ("smollm", "starcoder", "refact", "command-r")


def gguf_tokenizer(file: GGUFFile, vocab_size: int) -> Any | None:
    """The file's tokenizer, its chat template included; warns and gives None if it has none.

    Raises:
        ConversionError: it has more tokens than the embedding has rows, or is damaged.
    """
    if file.field("tokenizer.ggml.model", "none") in ("none", "no_vocab"):
        warnings.warn(f"{file.path}: holds no tokenizer, none is written", stacklevel=3)
        return None
    tokens = file.field("tokenizer.ggml.tokens", [])
    if len(tokens) > vocab_size:
        raise ConversionError(
            f"{file.path}: its tokenizer has {len(tokens)} tokens, but token_embd.weight only "
            f"{vocab_size} rows"
        )
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(
            file.path.parent, gguf_file=file.path.name, local_files_only=True
        )
    except Exception as error:  # the library raises whatever a broken file happens to cause
        raise ConversionError(
            f"{file.path}: its tokenizer cannot be read: {one_line(error)[:200]}"
        ) from error
    cut = file.field("tokenizer.ggml.pre", "gpt-2")
    if file.field("tokenizer.ggml.model") != "gpt2" or cut in KNOWN_CUTS:
        return tokenizer
    if cut in DIGIT_CUTS:
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
            ]
        )
    else:
        warnings.warn(
            f"{file.path}: tokenizer.ggml.pre={cut!r} is not known; text is cut as GPT-2 does "
            "before the merges, compare with the original tokenizer",
            stacklevel=3,
        )
    return tokenizer


def gguf_bos(file: GGUFFile, tokenizer: Any) -> Bos:
    """Whether texts begin with BOS: as the file says, else as llama.cpp takes one that does not.

    Transformers does not read the field, so its tokenizer does not know.
    """
    token = file.field("tokenizer.ggml.bos_token_id", tokenizer.bos_token_id)
    added = file.field("tokenizer.ggml.add_bos_token")
    if added is None:
        model, cut = file.field("tokenizer.ggml.model"), file.field("tokenizer.ggml.pre")
        added = model == "llama" or cut in BOS_CUTS
    return Bos(token, bool(added) and token is not None)
