"""A vanilla model folded into a recursive one, or one that routes: what uptraining starts from.

Shared layers start from the layers that :mod:`mor.model.sharing` names (paper, appendix on
uptraining). What the folding lost can be put beside them as low-rank maps per use (arXiv
2410.20672): at full rank nothing is lost. A router starts with a gate of 1 under the update
h + g (block(h) - h) and lets every token through, so that the model begins as the recursive one.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from mor.choices import KVSharing, Relaxation, RouterType, Sharing
from mor.config import ConfigError, MoRConfig
from mor.hf.files import check_new, read_mapping
from mor.hf.load import load_model
from mor.hf.modeling import MoRForCausalLM
from mor.hf.write import write_model
from mor.model.layers import DecoderLayer
from mor.model.relaxation import LINEAR_MAPS, LowRank, short
from mor.model.router_base import RouterNet
from mor.model.routers import BoundaryRouter, TokenChoiceRouter
from mor.model.sharing import Initialization, recursion_config, source_layers, thinned_layers

Norms = Literal["shared", "apart", "own"]

GATE_BIAS = 2.0
"""A logit of 0 is then a gate of 1 with slope 0.12, and no logit makes it more than 1.14."""
ALL_THROUGH = -1e4
"""A boundary below every logit: until training has found one, every token goes on."""


@dataclass(frozen=True)
class Folding:
    """How a stack is folded.

    Attributes:
        num_recursions: R.
        sharing: which unrolled layer uses which shared layer.
        init: which layers the shared ones start from.
        num_prelude_layers, num_coda_layers: private layers; default 1 for ``middle_*``, else 0.
        norms: ``shared``, one set of norm weights per shared layer; ``apart``, one per use, all
            starting equal; ``own``, one per use, starting as the source layer's at that place.
            Default ``own`` with ``lora``, so that only linear maps are approximated, else
            ``shared``.
        relaxation: what else differs between uses.
        rank: of ``lora``; None for full rank.
        alpha: of ``lora``, see :class:`~mor.config.MoRConfig`; the start makes up for it.
        kv_sharing: see :class:`~mor.config.MoRConfig`.
        router: ``random`` cannot start as the folded model and is refused.
        capacities: of the depths once warm-up is over; default (R - depth) / R.
        capacity_warmup_steps: optimiser steps from full depth to ``capacities``.
        router_std: spread of router weights; just enough that no two tokens score the same.
        seed: for ``random`` and for what starts at random.
    """

    num_recursions: int
    sharing: Sharing = "middle_cycle"
    init: Initialization = "stepwise"
    num_prelude_layers: int | None = None
    num_coda_layers: int | None = None
    norms: Norms | None = None
    relaxation: Relaxation = "none"
    rank: int | None = 16
    alpha: float | None = None
    kv_sharing: KVSharing = "none"
    router: RouterType = "fixed"
    capacities: tuple[float, ...] | None = None
    capacity_warmup_steps: int = 1000
    router_std: float = 1e-5
    seed: int = 0


def fold_folder(
    source: str | Path, out: str | Path, folding: Folding, device: str | torch.device = "cpu"
) -> Path:
    """Fold the vanilla model of ``source`` into the new folder ``out``, in the same dtype.

    Tokenizer and generation settings come along; ``fold.json`` says how it was made.

    Raises:
        MorError: naming what does not fit. Nothing is written then.
    """
    source, out = Path(source), Path(out)
    check_new(out)
    model = load_model(source)
    config_file = source / "config.json"
    folder = source if config_file.is_file() else source / "model"
    stored = read_mapping(folder / "config.json").get("dtype") or "float32"
    folded = fold(model, folding, device)
    folded.to(getattr(torch, stored))
    notes = {"source": str(source), **asdict(folding)} | layer_map(model.config, folding)
    return write_model(folded, folder, out, {"fold.json": notes})


def layer_map(config: MoRConfig, folding: Folding) -> dict[str, Any]:
    """Where layers come from: ``stack``, those that stay, and ``shared_layers``, their sources."""
    layers, sides = config.num_hidden_layers, _sides(folding)
    return {
        "stack": thinned_layers(layers, folding.num_recursions, folding.sharing, **sides),
        "shared_layers": source_layers(
            layers,
            folding.num_recursions,
            folding.sharing,
            folding.init,
            np.random.default_rng(folding.seed),
            **sides,
        ),
    }


def _sides(folding: Folding) -> dict[str, int | None]:
    return {
        "num_prelude_layers": folding.num_prelude_layers,
        "num_coda_layers": folding.num_coda_layers,
    }


def folded_config(config: MoRConfig, folding: Folding) -> MoRConfig:
    """The configuration of the folded model.

    Raises:
        ConfigError: naming what does not fit.
    """
    if config.num_recursions != 1:
        raise ConfigError(
            f"num_recursions={config.num_recursions}: the source is folded already; give a vanilla "
            "model, such as `mor convert` writes"
        )
    if folding.num_recursions < 2:
        raise ConfigError(f"num_recursions={folding.num_recursions} folds nothing; use 2 or more")
    if folding.router == "random":
        raise ConfigError(
            "router='random' weighs tokens by chance, so that the model cannot begin as the folded "
            "one; use fixed, threshold, expert_choice or token_choice"
        )
    fields = config.to_dict()
    for name in ("num_hidden_layers", "router_capacities", "model_type", "architectures", "dtype"):
        fields.pop(name, None)
    fields |= recursion_config(
        config.num_hidden_layers,
        folding.num_recursions,
        folding.sharing,
        thin=True,
        num_prelude_layers=folding.num_prelude_layers,
        num_coda_layers=folding.num_coda_layers,
    )
    largest = min(config.hidden_size, config.intermediate_size)
    largest = max(largest, min(config.hidden_size, config.num_attention_heads * config.head_dim))
    fields |= {
        "share_norms": _norms(folding) == "shared",
        "relaxation": folding.relaxation,
        "relaxation_rank": largest if folding.rank is None else folding.rank,
        "relaxation_alpha": folding.alpha,
        "kv_sharing": folding.kv_sharing,
        "router": folding.router,
    }
    if folding.router != "fixed":
        fields |= open_router_fields(folding.capacity_warmup_steps)
        if folding.capacities is not None:
            fields["router_capacities"] = list(folding.capacities)
    return MoRConfig(**fields)


def open_router_fields(warmup_steps: int) -> dict[str, Any]:
    """The configuration of a router whose gate can start at 1, and full depth at the start."""
    return {
        "update_rule": "residual",
        "router_activation": "sigmoid",
        "router_gate_bias": GATE_BIAS,
        "router_alpha": 1 + math.exp(-GATE_BIAS),
        "router_capacity_warmup_steps": warmup_steps,
        "router_balance_warmup_steps": warmup_steps,
    }


def _norms(folding: Folding) -> Norms:
    return folding.norms or ("own" if folding.relaxation == "lora" else "shared")


@torch.no_grad()
def fold(
    source: MoRForCausalLM, folding: Folding, device: str | torch.device = "cpu"
) -> MoRForCausalLM:
    """The folded model, in evaluation mode, float32, on the CPU; ``source`` stays as it is.

    Args:
        source: a vanilla model.
        folding: how.
        device: where singular values are taken.

    Raises:
        ConfigError: naming what does not fit.
    """
    config = folded_config(source.config, folding)
    where = layer_map(source.config, folding)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(folding.seed)
        folded = MoRForCausalLM(config).float().eval()
        inner, outer = folded.model, source.model
        stack = [*outer.prelude_layers, *outer.block, *outer.coda_layers]
        inner.embed_tokens.weight.copy_(outer.embed_tokens.weight)
        inner.norm.weight.copy_(outer.norm.weight)
        if not config.tie_word_embeddings:
            inner.lm_head.weight.copy_(outer.lm_head.weight)
        kept = [stack[layer] for layer in where["stack"]]
        first = config.num_prelude_layers
        last = len(kept) - config.num_coda_layers
        private = [*inner.prelude_layers, *inner.coda_layers]
        for ours, theirs in zip(private, kept[:first] + kept[last:], strict=True):
            ours.load_state_dict(theirs.state_dict())
        for ours, layers in zip(inner.block, where["shared_layers"], strict=True):
            _start_shared(ours, [stack[layer] for layer in layers])
        for unrolled, theirs in enumerate(kept[first:last]):
            ours, use = inner.block[config.shared_layer(unrolled)], config.repetition(unrolled)
            if _norms(folding) == "own":
                _own_norms(ours, theirs, use)
            if config.relaxation == "lora":
                _low_rank(ours, theirs, use, torch.device(device), config.initializer_range)
        open_router(inner.router, folding.router_std)
    return folded


def _start_shared(ours: nn.Module, sources: list[DecoderLayer]) -> None:
    """The mean of ``sources``; where norms are kept apart, the same for every use."""
    states = [source.state_dict() for source in sources]
    for name, tensor in ours.state_dict().items():
        if name in states[0]:
            # One layer is copied as it is; several are averaged in double precision.
            mean = torch.stack([state[name].double() for state in states]).mean(0)
            tensor.copy_(states[0][name] if len(states) == 1 else mean)


def _own_norms(ours: nn.Module, theirs: nn.Module, use: int) -> None:
    state = theirs.state_dict()
    for name, tensor in ours.state_dict().items():
        if name.endswith("norm.weight"):
            tensor[use].copy_(state[name])


def _low_rank(
    ours: nn.Module, theirs: nn.Module, use: int, device: torch.device, std: float
) -> None:
    """What the shared maps lack at this use, as far as the rank reaches."""
    for half, names in LINEAR_MAPS.items():
        for name in names:
            shared: Any = ours.get_submodule(f"{half}.{name}")
            own: Any = theirs.get_submodule(f"{half}.{name}")
            beside: Any = ours.get_submodule(f"{half}.low_rank.{short(name)}")
            residual = own.weight.to(device).float() - shared.weight.to(device)
            factor_residual(residual, beside, use, std)
            if beside.bias is not None:
                beside.bias[use].copy_(own.bias.to(device).float() - shared.bias.to(device))


def factor_residual(residual: Tensor, low_rank: LowRank, use: int, std: float) -> None:
    """Set ``low_rank`` at ``use`` to the best approximation of ``residual`` [out, in] of its rank.

    Singular values are split evenly between the two factors, and the module's scale is divided
    out. Where there is nothing to add (a layer that is the shared one itself), the first factor is
    random, since two zero factors would give each other no gradient.
    """
    rank = low_rank.down.shape[1]
    left, values, right = torch.linalg.svd(residual.float(), full_matrices=False)
    left, values, right = left[:, :rank], values[:rank], right[:rank]
    used = values > 1e-7 * residual.abs().max()
    roots = (values / low_rank.scale).sqrt() * used
    noise = std * torch.randn(right.shape).to(right.device)
    down = torch.where(used[:, None], roots[:, None] * right, noise)
    low_rank.down[use].copy_(down)
    low_rank.up[use].copy_(left * roots)


@torch.no_grad()
def open_router(router: nn.Module, std: float) -> None:
    """A gate of nearly 1 for every token, and every token through every depth."""
    for module in router.modules():
        if isinstance(module, RouterNet):
            # The last matrix: what an mlp does before it stays random.
            nn.init.normal_(module.weight, 0.0, std)
    if isinstance(router, BoundaryRouter):
        router.boundary.fill_(ALL_THROUGH)
    if isinstance(router, TokenChoiceRouter):
        router.bias[-1] = 0.1 * router.config.router_alpha
