"""Floating-point operations, counted once for budgets, tables and benchmarks.

The paper's rule (section 3.1 and its appendix): 2 per parameter and token forward, plus the
products QK and AV counted for the causal half only (of an encoder, for all pairs); backward costs
twice forward. The maps of patches and frames count, a head over classes once per example. Low-rank
relaxation counts as the two thin products that it is. Norms, biases, gains, rotary positions,
softmax and the embedding look-up are not counted.

``convention="paper"`` reproduces the paper's published budgets and step counts instead. They come
out exactly when the forward pass alone is counted, without the head, and with key and value
projections as wide as the queries' (16.5e18 for 9,438 steps of 2.1 M tokens at 360M); see the test.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

import torch
from torch import Tensor

from mor.config import MoRConfig
from mor.config.choices import default_capacities
from mor.model.model import MoRModel
from mor.model.relaxation import effective_rank
from mor.model.stem import stem_flops

Convention = Literal["exact", "paper"]
_Keys = TypeVar("_Keys")


@dataclass(frozen=True)
class Flops:
    """FLOPs per token of the sequence, by stage.

    Attributes:
        prelude, coda, head: per token of the sequence.
        recurse: one number per depth, already times the share of tokens active there.
        router: all routing networks.
        exits: coda and head of the exits before the last that training takes a loss at.
        embed: of patches or frames; a look-up costs nothing.
        backward: backward passes counted, in forward passes (2, or 0 in the paper's budgets).
    """

    prelude: float
    recurse: tuple[float, ...]
    coda: float
    head: float
    router: float
    backward: float = 2.0
    exits: float = 0.0
    embed: float = 0.0

    @property
    def forward(self) -> float:
        """One forward pass."""
        return self.embed + self.prelude + sum(self.recurse) + self.coda + self.head + self.router

    @property
    def training(self) -> float:
        """Forward and backward, the exits of the loss included."""
        return (self.forward + self.exits) * (1 + self.backward)


def active_fractions(config: MoRConfig) -> list[float]:
    """Share of tokens that run each depth as planned: capacities, a balanced choice, or all."""
    recursions = config.num_recursions
    if config.router == "fixed":
        depth = config.router_fixed_depth or recursions
        return [1.0] * depth + [0.0] * (recursions - depth)
    if config.router == "token_choice":
        return default_capacities(recursions)
    return list(config.router_capacities)


def flops_per_token(
    config: MoRConfig,
    seq_len: float,
    active: Sequence[float] | None = None,
    convention: Convention = "exact",
    pairs: Sequence[float] | None = None,
    all_pairs: float | None = None,
) -> Flops:
    """FLOPs per token of sequences of ``seq_len``.

    Args:
        config: the model.
        seq_len: tokens per sequence; attention grows with it.
        active: share of tokens that run each depth; default :func:`active_fractions`.
        pairs: query-key pairs at each depth, per token of the sequence; default those of active
            tokens spread evenly over rows.
        all_pairs: those of a layer that every token runs; default seq_len / 2, of an encoder all.
        convention: ``exact`` counts what runs; ``paper`` the paper's published budgets (module
            docstring).
    """
    paper = convention == "paper"
    shares = list(active_fractions(config) if active is None else active)
    width, ffn = config.hidden_size, config.intermediate_size
    queries = config.num_attention_heads * config.head_dim
    keys = queries if paper else config.num_key_value_heads * config.head_dim
    key_value = 2 * 2 * width * keys
    linear = 2 * (2 * width * queries + 3 * width * ffn) + key_value
    # QK and AV, 2 FLOPs per multiply-add; a token meets the causal half of seq_len keys, or all.
    per_pair, met = 2 * 2 * queries, seq_len / 2 if config.is_causal else seq_len
    attention = per_pair * (met if all_pairs is None else all_pairs)
    if pairs is None:
        reach = keys_seen(config, shares, 1.0)
        pairs = [share * keys * met for share, keys in zip(shares, reach, strict=True)]
    layers, low_rank = config.num_recursion_layers, _low_rank_flops(config, keys)
    streams = config.recursion_streams
    mixing = 2.0 * width * (streams**2 + 2 * streams) if streams > 1 else 0.0
    recurse = []
    keys_and_values = key_value + low_rank["k_proj"] + low_rank["v_proj"]
    for depth, share in enumerate(shares):
        skipped = published = 0.0
        if config.kv_sharing == "propagate" and share:  # of those that leave before this depth
            published = ((shares[depth - 1] if depth else 1.0) - share) * keys_and_values
        if config.kv_sharing == "recursive":
            slices = range(depth * layers, (depth + 1) * layers)
            again = sum(config.repetition(unrolled) > 0 for unrolled in slices)
            skipped = keys_and_values * again / layers
        per_layer = share * (linear + sum(low_rank.values()) - skipped) + per_pair * pairs[depth]
        per_layer += published
        recurse.append(layers * per_layer + share * mixing)
    coda = config.num_coda_layers * (linear + attention)
    head = 0.0 if paper else _head_flops(config, seq_len)
    return Flops(
        prelude=config.num_prelude_layers * (linear + attention),
        recurse=tuple(recurse),
        coda=coda,
        head=head,
        router=0.0 if paper else _router_flops(config, shares),
        backward=0.0 if paper else 2.0,
        exits=sum(map(bool, config.exit_loss_weights or ())) * (coda + head),
        embed=_front_flops(config),
    )


def example_flops(config: MoRConfig, depths: Tensor, real: Tensor | None = None) -> Flops:
    """FLOPs per token of images or sounds as they were routed; times their tokens is an example's.

    Active tokens are taken to be spread evenly over an example; in an encoder that is exact.

    Args:
        config: the model.
        depths: [B, T] recursions that each token ran.
        real: bool [B, T]; None for all.
    """
    everyone = torch.ones_like(depths, dtype=torch.bool) if real is None else real
    active = [(depths > depth) & everyone for depth in range(config.num_recursions)]
    total, half = float(everyone.sum()), 0.5 if config.is_causal else 1.0

    def pairs_of(queries: Tensor, keys: Tensor) -> float:
        return half * float((queries.sum(1) * keys.sum(1)).double().sum()) / total

    seen = keys_seen(config, active, everyone)
    return flops_per_token(
        config,
        total / len(depths),
        [float(tokens.sum()) / total for tokens in active],
        pairs=[pairs_of(tokens, keys) for tokens, keys in zip(active, seen, strict=True)],
        all_pairs=pairs_of(everyone, everyone),
    )


def batch_flops(config: MoRConfig, depths: Tensor, document_ids: Tensor | None = None) -> Flops:
    """FLOPs per token of one batch as it was routed.

    Args:
        config: the model.
        depths: [B, T] recursions that each token ran.
        document_ids: [B, T] where documents were blind to each other.
    """
    begins = torch.zeros_like(depths, dtype=torch.bool)
    begins[:, 0] = True
    if document_ids is not None:
        begins[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]

    def pairs_of(queries: Tensor, keys: Tensor) -> float:
        """Per token: of its run's keys, a query meets those up to its own, half of the last."""
        count = keys.flatten().cumsum(0)
        before = torch.where(begins.flatten(), count - keys.flatten().long(), 0).cummax(0).values
        met = (count - before).double() - 0.5
        return float((met * queries.flatten()).sum()) / queries.numel()

    active = [depths > depth for depth in range(config.num_recursions)]
    everyone = torch.ones_like(begins)
    seen = keys_seen(config, active, everyone)
    pairs = [pairs_of(tokens, keys) for tokens, keys in zip(active, seen, strict=True)]
    return flops_per_token(
        config,
        depths.shape[1],
        [float(tokens.double().mean()) for tokens in active],
        pairs=pairs,
        all_pairs=pairs_of(everyone, everyone),
    )


def keys_seen(config: MoRConfig, active: list[_Keys], everyone: _Keys) -> list[_Keys]:
    """Of the tokens that run each depth, and of all tokens: those whose keys each depth sees."""
    if config.kv_sharing == "none":
        return active
    return [everyone if config.kv_sharing == "propagate" else active[0]] * len(active)


def _head_flops(config: MoRConfig, seq_len: float) -> float:
    """Of the head, per token of the sequence."""
    if config.head_type == "vocabulary":
        return 2.0 * config.hidden_size * config.vocab_size
    if config.head_type == "classes":  # once per example
        return 2.0 * config.hidden_size * (config.num_labels or 1) / seq_len
    return 2.0 * config.hidden_size * config.input_width


def _front_flops(config: MoRConfig) -> float:
    """Of the map of a patch, or of the convolutions over the frames of one token."""
    if config.modality == "text":
        return 0.0
    if config.modality == "image":
        return stem_flops(config) + 2.0 * config.patch_width * config.hidden_size
    total, before = 0.0, config.num_mel_bins or 0
    places = config.frames_per_token  # of a layer's output, per token
    for kernel, stride in zip(config.conv_kernel, config.conv_stride, strict=True):
        places //= stride
        total += 2.0 * places * kernel * before * config.hidden_size
        before = config.hidden_size
    return total


def _low_rank_flops(config: MoRConfig, keys: int) -> dict[str, float]:
    """Of one token through the low-rank part of each linear map of a shared layer."""
    width, ffn = config.hidden_size, config.intermediate_size
    queries = config.num_attention_heads * config.head_dim
    sizes = {
        "q_proj": (width, queries),
        "k_proj": (width, keys),
        "v_proj": (width, keys),
        "o_proj": (queries, width),
        "gate_proj": (width, ffn),
        "up_proj": (width, ffn),
        "down_proj": (ffn, width),
    }
    if config.relaxation != "lora":
        return dict.fromkeys(sizes, 0.0)
    return {name: 2.0 * effective_rank(config, *size) * sum(size) for name, size in sizes.items()}


def _router_flops(config: MoRConfig, shares: list[float]) -> float:
    if config.router in ("fixed", "random"):
        return 0.0
    width = config.hidden_size
    outputs = config.num_recursions if config.router == "token_choice" else 1
    one = 2.0 * width * outputs
    if config.router_architecture != "linear":
        one = 2.0 * width * 2 * width + 2.0 * 2 * width * outputs
    if config.router == "token_choice":
        return one
    nets = 2 if config.router_objective == "aux_router" and config.router == "expert_choice" else 1
    # Depth r scores the tokens that ran depth r - 1.
    return nets * one * (1 + sum(shares[:-1]))


def count_parameters(config: MoRConfig) -> tuple[int, int]:
    """Unique parameters of a model of ``config``: (all, without the embedding and the head).

    Built on the meta device, so that no memory is taken.
    """
    with torch.device("meta"):
        model = MoRModel(config)
    total = sum(p.numel() for p in model.parameters())
    ends = {*model.embed_tokens.parameters(), *model.lm_head.parameters()}  # a tied head once
    return total, total - sum(p.numel() for p in ends)
