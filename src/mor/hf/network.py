"""One call of the network with Transformers' arguments: what all classes of ours share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mor.config import MoRConfig
from mor.hf.arguments import check_ids, check_length, one_cache, take_known
from mor.hf.backbone import packed_documents
from mor.hf.cache import MoRCache
from mor.model.model import MoRModel
from mor.model.output import ModelOutput

_FEATURES = ("pixel_values", "input_features")


def call_network(
    where: str,
    model: MoRModel,
    inputs: dict[str, Any],
    extra: dict[str, Any],
    accepted: tuple[str, ...],
    *,
    use_cache: bool | None,
    by_default: bool = False,
    **options: Any,
) -> tuple[ModelOutput, MoRCache | None]:
    """Check the arguments of a forward, then run the network up to its coda.

    Args:
        where: who was called, for messages.
        model: the network.
        inputs: ``input_ids`` [B, T] or ``inputs_embeds`` [B, T, D], and what goes with them:
            ``attention_mask``, ``position_ids``, ``past_key_values``, ``cache``, ``document_ids``,
            ``cu_seq_lens_q``, ``seq_idx``. Or ``pixel_values`` or ``input_features``.
        extra: arguments that the forward has no parameter for; what is left must change nothing.
        accepted: the names of its parameters.
        use_cache: whether to make a cache where none is given; None for ``by_default``, and not
            where documents share a row.
        options: for :class:`mor.model.MoRModel`.

    Returns:
        What the network gave, and the cache.

    Raises:
        ArgumentError: an unknown argument, one that is not supported, a foreign cache.
        ValueError: wrong shapes, a token id out of range, too long a sequence.
    """
    config: MoRConfig = model.config
    ids, embeds = inputs.get("input_ids"), inputs.get("inputs_embeds")
    mask, positions = inputs.get("attention_mask"), inputs.get("position_ids")
    cache = one_cache(inputs.get("past_key_values"), inputs.get("cache"), config)
    given: Tensor | None = embeds if ids is None else ids
    lengths = inputs.get("cu_seq_lens_q")
    if extra:
        past = 0 if cache is None else cache.columns
        width = 0 if given is None else given.shape[1]
        known = {"cu_seq_lens_q": lengths, "past": past, "width": width}
        take_known(where, extra, accepted, context=known)
    check_ids(ids, config.vocab_size)
    documents = inputs.get("document_ids")
    if documents is None:
        alone = positions if cache is None else None
        documents = packed_documents(alone, mask, lengths, inputs.get("seq_idx"))
    if use_cache is None:
        use_cache = by_default and documents is None and not torch.compiler.is_exporting()
    if cache is None and use_cache:
        cache = MoRCache(config)
    check_length(given, mask, cache, config.max_position_embeddings)
    output = model(
        input_ids=ids,
        attention_mask=mask,
        positions=positions,
        cache=cache,
        inputs_embeds=embeds,
        document_ids=documents,
        features=next((inputs[name] for name in _FEATURES if inputs.get(name) is not None), None),
        **options,
    )
    return output, cache
