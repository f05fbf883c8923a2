"""What Transformers' arguments mean here: understood, harmless, or refused by name.

A forward with ``**kwargs`` that nobody looks at takes a misspelt or unsupported argument without a
word and computes something else. So every forward of ours hands what it does not know to
:func:`take_known`. Libraries pass a lot that changes nothing (``output_attentions=False``,
``token_type_ids`` of zeros); that goes through.

Transformers 5.24 renamed ``past_key_values`` to ``cache``. :data:`CACHE_NAME` is the name that the
installed version uses; both are accepted.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import TransformersKwargs

from mor.config import MoRConfig
from mor.errors import MorError, nearest
from mor.hf.cache import MoRCache
from mor.hf.foreign import become_ours, is_empty, is_plain, pour_from

CACHE_NAMES = ("cache", "past_key_values")
"""The new name and the old one."""

CACHE_NAME: str = next(
    name for name in CACHE_NAMES if name in {field.name for field in fields(CausalLMOutputWithPast)}
)
"""The name of the cache in the installed version's ``generate`` and output classes."""


class ArgumentError(MorError, TypeError, ValueError):
    """An argument that a forward does not take, or not with this value.

    A ``TypeError``, as Python's own for an unknown keyword, and a ``ValueError``, as for all other
    wrong inputs.
    """


# Why a value other than None or False is refused, where there is more to say than "not supported".
_WHY = {
    "output_attentions": "no attention weights are ever laid out",
    "output_router_logits": "output_router_traces=True returns scores and selections per depth",
    "token_type_ids": "there are no token types; only zeros change nothing",
    "head_mask": "heads cannot be masked",
    "is_causal": "attention is causal at every depth",
    "cache_position": "new tokens follow what is cached; leave it out",
    "cu_seq_lens_k": "it must be the same as cu_seq_lens_q",
}
# Documented arguments of Transformers' language models that have no meaning here.
_DOCUMENTED = frozenset(_WHY) | {
    *TransformersKwargs.__annotations__,
    *("block_sequence_ids", "cache_params", "cross_attn_head_mask", "debug_io"),
    *("decoder_attention_mask", "decoder_head_mask", "decoder_input_ids", "decoder_inputs_embeds"),
    *("encoder_attention_mask", "encoder_hidden_states", "encoder_outputs", "mems"),
    *("mm_token_type_ids", "past_buckets_states", "pixel_values", "return_loss", "shift_labels"),
    *("state",),
}  # fmt: skip
# These only describe what cu_seq_lens_q says.
_DERIVED = ("max_length_q", "max_length_k")


def take_known(
    where: str,
    extra: dict[str, Any],
    accepted: Collection[str],
    elsewhere: Mapping[str, str] | None = None,
    context: Mapping[str, Any] | None = None,
) -> None:
    """Refuse what is left in ``extra`` unless it is documented by Transformers and changes nothing.

    Args:
        where: who was called, for the message.
        extra: keyword arguments that the caller has no parameter for.
        accepted: the names of its parameters.
        elsewhere: names that are not for this caller, and why; None and False go through.
        context: what an argument is compared with: ``cu_seq_lens_q``, and ``past`` and ``width``
            (columns cached and columns of this call).

    Raises:
        ArgumentError: an unknown name, or a documented one whose value would change the result.
    """
    reasons = {**_WHY, **(elsewhere or {})}
    for name, value in extra.items():
        if name not in _DOCUMENTED and name not in reasons:
            near = nearest(name, accepted)
            hint = f"did you mean {near!r}? It takes: " if near else "it takes: "
            raise ArgumentError(
                f"{where} takes no argument {name!r}; {hint}{', '.join(sorted(accepted))}"
            )
        if _changes_nothing(name, value, context or {}):
            continue
        why = reasons.get(name, "leave it out")
        raise ArgumentError(f"{name}={_show(value)} is not supported by {where}: {why}")


def _changes_nothing(name: str, value: Any, context: Mapping[str, Any]) -> bool:
    if value is None or name in _DERIVED:
        return True
    if not isinstance(value, Tensor):
        return value is (name == "is_causal")
    if name in ("token_type_ids", "mm_token_type_ids"):
        return not bool(value.any())
    if name == "cu_seq_lens_k":
        same = context.get("cu_seq_lens_q")
        return same is not None and torch.equal(value.long(), same.long())
    if name == "cache_position" and "past" in context:
        past, width = context["past"], context["width"]
        places = torch.arange(past, past + width, device=value.device)
        return torch.equal(value.flatten().long(), places)
    return False


def _show(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"<tensor {list(value.shape)}>"
    text = repr(value)
    return text if len(text) <= 60 else f"<{type(value).__name__}>"


def one_cache(past_key_values: Any, cache: Any, config: MoRConfig) -> MoRCache | None:
    """The cache, whichever of its two names it came by, as ours (see :mod:`mor.hf.foreign`).

    A learned prefix may stand beside our empty cache: it is then what that one begins with.

    Raises:
        ArgumentError: two caches, or one of a foreign kind.
        ValueError: a filled ``DynamicCache`` that is not of this model's shape.
    """
    given = [
        (name, value)
        for name, value in zip(CACHE_NAMES, (cache, past_key_values), strict=True)
        if value is not None
    ]
    for name, found in given:
        if not (isinstance(found, MoRCache) or is_plain(found)):
            raise ArgumentError(
                f"{name} is a {type(found).__name__}; MoR caches per depth: use MoRCache"
            )
    held = list({id(value): value for _, value in given}.values())
    if len(held) == 2:
        ours = [value for value in held if isinstance(value, MoRCache) and is_empty(value)]
        prefix = [value for value in held if is_plain(value) and not is_empty(value)]
        if ours and prefix:
            return pour_from(prefix[0], ours[0])
        raise ArgumentError(
            "cache and past_key_values are two names of one argument and hold two caches; give one"
        )
    if not held:
        return None
    return held[0] if isinstance(held[0], MoRCache) else become_ours(held[0], config)


def check_ids(input_ids: Tensor | None, vocab_size: int) -> None:
    """Refuse token ids outside the vocabulary, on the CPU.

    A wrong id on a GPU kills the process long after; there the check would cost a sync. A traced
    graph (``torch.export``) cannot branch on numbers: there it is left out.

    Raises:
        ValueError: naming the id.
    """
    if torch.compiler.is_compiling() or input_ids is None or input_ids.device.type != "cpu":
        return
    if not input_ids.numel():
        return
    low, high = int(input_ids.min()), int(input_ids.max())
    if low < 0 or high >= vocab_size:
        raise ValueError(
            f"input_ids holds token id {low if low < 0 else high}; "
            f"vocab_size={vocab_size} allows 0..{vocab_size - 1}"
        )


def check_length(
    inputs: Tensor | None, attention_mask: Tensor | None, cache: MoRCache | None, limit: int
) -> None:
    """Refuse a sequence of more than ``limit`` real tokens, cached ones included.

    Raises:
        ValueError: naming the length.
    """
    if torch.compiler.is_compiling():  # as for ids
        return
    width = 0 if inputs is None else inputs.shape[1]
    if width + (0 if cache is None else cache.columns) <= limit:
        return
    # Padding is no token: only now that it matters are the real ones counted.
    seen = 0 if cache is None or cache.seen is None else cache.seen
    real = torch.tensor(width) if attention_mask is None else attention_mask[:, -width:].sum(1)
    tokens = int((real + seen).max())
    if tokens > limit:
        raise ValueError(
            f"the sequence is {tokens} tokens long, past max_position_embeddings={limit}"
        )
