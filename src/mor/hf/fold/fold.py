"""A vanilla model folded into a recursive one, or one that routes: what uptraining starts from.

Shared layers start from the layers that :mod:`mor.model.sharing` names (paper, appendix on
uptraining). What the folding lost can be put beside them as low-rank maps per use (arXiv
2410.20672): at full rank nothing is lost. A router starts with a gate of 1 under the update
h + g (block(h) - h) and lets every token through, so that the model begins as the recursive one.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mor.disk import check_new
from mor.folder.weights import read_mapping
from mor.hf.convert.write import write_model
from mor.hf.fold.plan import Folding, folded_config, layer_map, resolve_norms, starts_at_own_layer
from mor.hf.load import load_model
from mor.hf.modeling import MoRForCausalLM
from mor.model.layers import DecoderLayer
from mor.model.relaxation import LINEAR_MAPS, Gain, LowRank, short
from mor.model.routers import BoundaryRouter, TokenChoiceRouter
from mor.model.routers.net import RouterNet
from mor.run_files import CONFIG, model_folder

ALL_THROUGH = -1e4
"""A boundary below every logit: until training has found one, every token goes on."""


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
    folder = model_folder(source)
    model = load_model(folder)
    stored = read_mapping(folder / CONFIG).get("dtype") or "float32"
    folded = fold(model, folding, device)
    folded.to(getattr(torch, stored))
    notes = {"source": str(source), **asdict(folding)} | layer_map(model.config, folding)
    return write_model(folded, folder, out, {"fold.json": notes})


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
            if resolve_norms(folding) == "own":
                _own_norms(ours, theirs, use)
            if not starts_at_own_layer(config, where, unrolled):
                _quieten(ours, use, folding.start_gain)
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


def _quieten(ours: nn.Module, use: int, gain: float) -> None:
    for module in ours.modules():
        if isinstance(module, Gain):
            module.weight[use] = gain


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
