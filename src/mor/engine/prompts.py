"""Prompts as token ids, and the ids that end a text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mor.config import MoRConfig
from mor.errors import MorError
from mor.hf.modeling import MoRForCausalLM


def prompt_ids(prompt: str | Sequence[int], tokenizer: Any, config: MoRConfig) -> tuple[int, ...]:
    """Ids of a prompt. An empty text is the beginning-of-text token.

    Raises:
        MorError: no tokenizer for a text, nothing in it, ids that the model does not have.
    """
    if isinstance(prompt, str):
        if tokenizer is None:
            raise MorError("prompt is a text, but the engine has no tokenizer; give token ids")
        ids = list(tokenizer(prompt).input_ids) if prompt else []
        if not ids:
            start = config.bos_token_id if config.bos_token_id is not None else config.eos_token_id
            start = start[0] if isinstance(start, list) else start
            ids = [] if start is None else [start]
    else:
        ids = list(prompt)
    if not ids:
        raise MorError("prompt is empty; give at least one token")
    for token in ids:
        if isinstance(token, bool) or not isinstance(token, int):
            raise MorError(f"prompt holds {token!r}; it must be a text or a list of token ids")
        if not 0 <= token < config.vocab_size:
            raise MorError(
                f"prompt holds token id {token}; vocab_size={config.vocab_size} allows "
                f"0..{config.vocab_size - 1}"
            )
    return tuple(ids)


def end_ids(model: MoRForCausalLM) -> frozenset[int]:
    """Token ids that end a text, as ``model.generate`` takes them."""
    found = None
    if model.generation_config is not None:
        found = model.generation_config.eos_token_id
    if found is None:
        found = model.config.eos_token_id
    if found is None:
        return frozenset()
    return frozenset([found] if isinstance(found, int) else found)
