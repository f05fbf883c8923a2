"""Random models for timing: exits forced to a stated share of tokens per depth, text not a loop.

Speed does not hang on what the weights say, as long as two things hold. Tokens must leave at the
depths that a trained model's would, and greedy text must not fall into one repeated token, or
equality with a peer would prove nothing.

**Forced exits.** The depth of a token is written into its embedding: channel 0 holds a code, and
no layer writes to that channel (row 0 of every output and down projection is zero). The threshold
router's weight reads that channel alone, and its boundaries lie between the codes. So the real
router runs, at its real cost, in any engine, in ``model.generate`` and after saving; only its
answer is known before. The final norm drops the channel, so that the head does not see it.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch

from mor.config import MoRConfig
from mor.config.choices import default_capacities
from mor.config.presets import SHAPES, preset
from mor.errors import MorError
from mor.hf.modeling import MoRForCausalLM

CHANNEL = 0
# Codes grow by 3 and boundaries lie at two thirds of the next. The gated update may let the channel
# grow by 1 + alpha at each depth (alpha is 0.1 here): no code reaches the next boundary by that.
STEP = 3.0
# At the usual start attention is nearly uniform and writes little, so that what follows hangs on
# the last token alone, and greedy text runs in a circle of a few tokens. Sharper queries and keys
# and a larger output make half of 64 tokens different: each request goes its own way. Sharper
# still, and the network magnifies the last bits of a sum: at 8, float32 is 0.18 of the logits'
# deviation off float64 after 150 tokens at 135M, in PyTorch's own products too; at 5, 0.0002.
SHARPER, LOUDER = 5.0, 10.0


def bench_config(
    shape: str, recursions: int = 1, layers: int | None = None, family: str | None = None
) -> MoRConfig:
    """The configuration of a paper shape for timing.

    Args:
        shape: ``135m``, ``360m``, ... (:data:`mor.config.presets.SHAPES`), or ``tiny`` for tests.
        recursions: R.
        layers: unrolled depth, where it is not the preset's.
        family: ``vanilla``, ``recursive`` or ``mor``; default by R.
    """
    family = family or ("mor" if recursions > 1 else "vanilla")
    more: dict[str, Any] = {"router": "threshold", "router_alpha": 0.1} if family == "mor" else {}
    if layers is not None:
        more["num_hidden_layers"] = layers
    if shape == "tiny":
        return _tiny(recursions, **more)
    if shape not in SHAPES:
        raise MorError(f"preset={shape!r} is not known; use one of: {', '.join(SHAPES)}, tiny")
    return preset(shape, family, num_recursions=recursions, **more)


def _tiny(recursions: int, **more: Any) -> MoRConfig:
    fields: dict[str, Any] = (
        {"num_recursion_layers": 6 // recursions} if "num_hidden_layers" not in more else {}
    )
    return MoRConfig(
        vocab_size=320, hidden_size=128, intermediate_size=192, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=1024, bos_token_id=0, eos_token_id=0,
        num_recursions=recursions, num_prelude_layers=1, num_coda_layers=1,
        **(fields | more),
    )  # fmt: skip


def bench_model(
    config: MoRConfig,
    seed: int = 0,
    capacities: Sequence[float] | None = None,
    device: torch.device | None = None,
) -> MoRForCausalLM:
    """A random model of ``config`` in evaluation mode; exits are forced where a router decides.

    Its weights are numbers that bfloat16 holds, as those of published checkpoints of these shapes.

    Args:
        config: ``threshold`` router for forced exits, ``fixed`` for the baselines.
        seed: weights, and which token has which depth.
        capacities: share of token ids that run each depth; default (R - depth) / R.
        device: where weights are drawn, other ones on each kind; default the CPU.

    Raises:
        MorError: another router, whose answer cannot be forced; wrong capacities.
    """
    device = torch.device("cpu") if device is None else device
    with torch.random.fork_rng([device] if device.type == "cuda" else []), device:
        torch.manual_seed(seed)
        model = MoRForCausalLM(config).eval().requires_grad_(False)
    core = model.model
    layers = [*core.prelude_layers, *core.block, *core.coda_layers]
    for layer in layers:
        layer.self_attn.q_proj.weight.mul_(SHARPER)
        layer.self_attn.k_proj.weight.mul_(SHARPER)
        layer.self_attn.o_proj.weight.mul_(LOUDER)
    if config.num_recursions > 1 and config.router != "fixed":
        _force_exits(model, layers, seed, capacities)
    for name, weight in model.named_parameters():
        if ".router." not in name:
            weight.copy_(weight.bfloat16())
    return model


def depths_of_tokens(config: MoRConfig, seed: int, capacities: Sequence[float]) -> torch.Tensor:
    """Recursions [V] that each token id runs: the shares of ``capacities``, in random order."""
    recursions = config.num_recursions
    falling = all(a >= b for a, b in pairwise(capacities))
    if len(capacities) != recursions or capacities[0] != 1 or not falling or capacities[-1] < 0:
        raise MorError(
            f"capacities={list(capacities)} must be {recursions} shares that begin with 1 and do "
            "not grow"
        )
    order = torch.randperm(config.vocab_size, generator=torch.Generator().manual_seed(seed + 1))
    counts = torch.tensor([round(share * config.vocab_size) for share in capacities])
    return (order[:, None] < counts).sum(1)


def _force_exits(
    model: MoRForCausalLM, layers: list[Any], seed: int, capacities: Sequence[float] | None
) -> None:
    config, core = model.config, model.model
    router: Any = core.router
    if config.router != "threshold" or config.update_rule != "gated":
        raise MorError(
            f"router={config.router!r}: exits are forced through router='threshold' with "
            "update_rule='gated' only"
        )
    shares = default_capacities(config.num_recursions) if capacities is None else capacities
    depths = depths_of_tokens(config, seed, shares)
    unit = config.initializer_range
    codes = torch.where(depths == 1, -1.0, STEP ** (depths - 2).double()).float()
    core.embed_tokens.weight[:, CHANNEL] = unit * codes
    for layer in layers:
        layer.self_attn.o_proj.weight[CHANNEL] = 0
        layer.mlp.down_proj.weight[CHANNEL] = 0
    core.norm.weight[CHANNEL] = 0
    router.net.weight.zero_()
    router.net.weight[:, 0, CHANNEL] = 1 / unit
    # Depth r is for tokens that run r + 1 recursions or more: codes of at least STEP ** (r - 1).
    bounds = [0.0 if depth <= 1 else 2 / 3 * STEP ** (depth - 1) for depth in range(len(shares))]
    router.boundary.copy_(torch.tensor(bounds))
