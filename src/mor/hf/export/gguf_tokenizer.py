"""A byte-level BPE tokenizer as a GGUF file stores it: tokens, merges, and how text is cut.

llama.cpp cuts text before the merges by a rule of its own list, known by name; a tokenizer that
cuts in another way would give other tokens there, and is refused.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mor.errors import MorError
from mor.folder.tokenizer import load_tokenizer

_DIGITS = {"type": "Digits", "individual_digits": True}
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Their names of rules, by the regular expression that Transformers' tokenizers have.
_BY_REGEX = {_WORDS % "": "qwen2", _WORDS % "{1,3}": "llama-bpe"}
_NORMAL, _CONTROL, _USER, _UNUSED = 1, 3, 4, 5


def write_tokenizer(writer: Any, folder: Path, rows: int) -> None:
    """Add the tokenizer of a model folder to a ``gguf.GGUFWriter``.

    Args:
        writer: of the file.
        folder: with ``tokenizer.json``.
        rows: of the embedding; ids that no token has are filled up.

    Raises:
        MorError: no tokenizer, or one that the format cannot hold as it is.
    """
    tokenizer = load_tokenizer(folder)
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise MorError(f"{folder}: its tokenizer is no fast one (tokenizer.json); GGUF needs that")
    rules = json.loads(backend.to_str())
    model = rules["model"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(cut_name(rules, folder))
    tokens = [f"[UNUSED{number}]" for number in range(rows)]
    kinds = [_UNUSED] * rows
    added = {token["id"]: token for token in rules.get("added_tokens", [])}
    for text, number in model["vocab"].items():
        _check_row(number, rows, folder)
        tokens[number], kinds[number] = text, _NORMAL
    for number, token in added.items():
        _check_row(number, rows, folder)
        tokens[number] = token["content"]
        kinds[number] = _CONTROL if token["special"] else _USER
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
    # The library writes no empty list; a merge of tokens that are not there does nothing.
    writer.add_token_merges(merges or ["\u0100 \u0100"])
    if tokenizer.chat_template is not None:
        writer.add_chat_template(tokenizer.chat_template)


def _check_row(number: int, rows: int, folder: Path) -> None:
    if number >= rows:
        raise MorError(
            f"{folder}: its tokenizer has token id {number}, the model's embedding {rows} rows"
        )


def cut_name(rules: dict[str, Any], folder: Path) -> str:
    """llama.cpp's name for how a tokenizer cuts text before the merges.

    Args:
        rules: of a ``tokenizer.json``.
        folder: for messages.

    Raises:
        MorError: no byte-level BPE, or a rule without a name.
    """
    model, normalizer = rules["model"], rules.get("normalizer")
    steps = rules.get("pre_tokenizer") or {}
    parts = steps.get("pretokenizers", [steps]) if steps else []
    last = parts[-1] if parts else {}
    if model["type"] != "BPE" or last.get("type") != "ByteLevel" or model.get("byte_fallback"):
        raise MorError(
            f"{folder}: its tokenizer is a {model['type']} model that does not work on bytes; only "
            "byte-level BPE (GPT-2's, Llama 3's, Qwen's, mor data prepare's) can be written as GGUF"
        )
    name = _name_of(parts[:-1], last)
    plain = normalizer is None or (normalizer.get("type") == "NFC" and name == "qwen2")
    if name is None or not plain or last.get("add_prefix_space"):
        raise MorError(
            f"{folder}: its tokenizer cuts text by a rule that llama.cpp has no name for "
            f"(pre_tokenizer={steps}, normalizer={normalizer}); its tokens would differ there"
        )
    return name


def _name_of(before: list[dict[str, Any]], last: dict[str, Any]) -> str | None:
    if last.get("use_regex", True):
        if not before:
            return "gpt-2"
        return "smollm" if before == [_DIGITS] else None
    if len(before) != 1 or before[0].get("type") != "Split":
        return None
    split = before[0]
    if split.get("behavior") != "Isolated" or split.get("invert"):
        return None
    return _BY_REGEX.get(split.get("pattern", {}).get("Regex", ""))
