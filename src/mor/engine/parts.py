"""The engine put together from its sizes: once at the start, and again after a failed step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from mor.checks import check_choice, check_flag
from mor.engine.attend import PagedAttention
from mor.engine.device import DeviceAttention
from mor.engine.drafting import Drafting
from mor.engine.entries import KVCacheType, entry_type
from mor.engine.forms import AttentionName, Setting, choose_attention, name_of
from mor.engine.intake import Intake, end_ids
from mor.engine.lanes import Lanes
from mor.engine.leaving import Leaving
from mor.engine.memory import pages_that_fit
from mor.engine.mirror import Reads
from mor.engine.options import Sizes, Speculate
from mor.engine.runner import Runner
from mor.engine.scheduler import Policy, Scheduler
from mor.engine.static_runner import StaticRunner
from mor.engine.stats import EngineStats
from mor.engine.store import KVStore
from mor.errors import MorError
from mor.model.fused_layers import fused_view
from mor.model.model import MoRModel
from mor.model.packed import PackedModel, Quantization, serving_view
from mor.model.servable import Servable


@dataclass(frozen=True)
class Plan:
    """All that does not change while an engine lives.

    Attributes:
        network: in evaluation mode, packed where there are kernels.
        tokenizer: for texts; None where there is none.
        ends: token ids that end a text.
        sizes: how much is taken on at a time.
        num_pages: pages in the pool.
        policy: of the scheduler, or ``full_depth``.
        attention: form of paged attention.
        prefix_caching: whether requests share the pages of equal beginnings.
        entries: type of keys and values in memory.
        static: whether stages run over static buffers, and are read late.
        speculate: how many tokens are guessed, and at what depth.
    """

    network: MoRModel
    tokenizer: Any
    ends: frozenset[int]
    sizes: Sizes
    num_pages: int
    policy: Policy
    attention: PagedAttention
    prefix_caching: bool
    entries: torch.dtype
    static: bool
    speculate: Speculate


def make_plan(
    model: Servable,
    tokenizer: Any,
    sizes: Sizes,
    *,
    num_pages: int | None,
    memory_fraction: float,
    policy: Policy,
    quantization: Quantization | None,
    attention: AttentionName | PagedAttention | None,
    prefix_caching: bool,
    kv_cache_dtype: KVCacheType,
    release_weights: bool,
    static_stages: bool | None,
    speculate: Speculate,
) -> Plan:
    """The plan for a model; None stands for a default.

    Raises:
        MorError: naming the argument, its value and what would be right.
    """
    check_choice("policy", policy, Policy)
    check_flag("prefix_caching", prefix_caching)
    check_flag("release_weights", release_weights)
    check_choice("kv_cache_dtype", kv_cache_dtype, KVCacheType)
    entries = entry_type(kv_cache_dtype, model.dtype)
    config, device = model.config, model.device
    if static_stages is not None:
        check_flag("static_stages", static_stages)
    if static_stages and attention in (None, "auto") and device.type == "cpu":
        attention = "plain"
    chosen = choose_attention(attention, Setting(config, device, model.dtype, entries))
    waitless = isinstance(chosen, DeviceAttention)
    static = waitless and device.type != "cpu" if static_stages is None else static_stages
    if static and not waitless:
        raise MorError(
            f"static_stages=True needs a form of attention that asks for no length; attention="
            f"{name_of(chosen)!r} does, use 'plain', 'triton', 'varlen' or 'flashinfer'"
        )
    if static and speculate.tokens:
        raise MorError(
            f"speculate={speculate.tokens} needs each answer at once, and static stages are read a "
            "tick late; set static_stages=False, or speculate=0"
        )
    # Its packed weights first: pages take a share of the memory that is left.
    fused = static and quantization is None
    network = fused_view(model.model) if fused else serving_view(model.model, quantization)
    if release_weights and isinstance(network, PackedModel):
        network.release_plain()
    if num_pages is None:
        tokens = sizes.max_residents * sizes.max_model_len
        num_pages = pages_that_fit(
            config, sizes.max_depth, sizes.page_size, tokens, memory_fraction, entries, device
        )
    sizes = sizes.fit(config, num_pages)
    return Plan(
        network, tokenizer, end_ids(model), sizes, num_pages, policy, chosen, prefix_caching,
        entries, static, speculate,
    )  # fmt: skip


class Parts:
    """What a plan becomes: pages, lanes, the runner over them, and the scheduler; all empty.

    Args:
        plan: how large.
        stats: counters, which go on.
    """

    def __init__(self, plan: Plan, stats: EngineStats) -> None:
        network, sizes = plan.network, plan.sizes
        config, weight = network.config, network.embed_tokens.weight
        dtype, device = weight.dtype, weight.device
        self.store = KVStore(
            config, plan.num_pages, sizes.page_size, sizes.max_residents, sizes.max_model_len,
            sizes.max_depth, plan.entries, device,
        )  # fmt: skip
        self.intake = Intake(
            config,
            self.store,
            plan.tokenizer,
            plan.ends,
            sizes.max_model_len,
            sizes.max_depth,
            weight,
        )
        self.lanes = Lanes(
            sizes.lanes, network.carried_width, dtype, device, network.router, network.needs_origin
        )
        full = plan.policy == "full_depth"
        kind = StaticRunner if plan.static else Runner
        self.reads = Reads(late=1) if plan.static else Reads(late=None)
        self.runner = kind(network, self.store, self.lanes, plan.attention, sizes.max_depth, full)
        self.drafting = Drafting(self.store, plan.speculate)
        self.scheduler = Scheduler(
            self.store, self.lanes, stats, residents=sizes.max_residents,
            max_num_seqs=sizes.max_num_seqs, prefill_chunk=sizes.prefill_chunk,
            min_gather=sizes.min_gather, policy=plan.policy, prefix_caching=plan.prefix_caching,
            drafting=self.drafting,
        )  # fmt: skip
        self.leaving = Leaving(self.scheduler, self.runner, self.reads, stats)
