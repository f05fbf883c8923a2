"""Sharded checkpoints (``torch.distributed.checkpoint``) that any number of ranks reads.

CHECKPOINT/pytorch_model_fsdp_0/   weights, one file per rank that wrote, and ``.metadata``
CHECKPOINT/optimizer_0/            optimiser state, by parameter name
CHECKPOINT/config.json             the network

The names are Accelerate's, so that its ``merge-weights`` reads the weights too. What one process or
DDP writes (``model.safetensors``, ``optimizer.pt``) loads into a sharded model and the other way
round.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor, distribute_tensor

from mor.config import MoRConfig
from mor.data import Bos
from mor.errors import MorError
from mor.hf.bos import set_bos
from mor.hf.modeling import MoRForCausalLM

WEIGHTS, OPTIMIZER = "pytorch_model_fsdp_0", "optimizer_0"
_HEAD = "model.lm_head.weight"


def has_shards(checkpoint: Path) -> bool:
    """Whether this checkpoint is a sharded one."""
    return (checkpoint / WEIGHTS).is_dir()


def is_whole(checkpoint: Path) -> bool:
    """Whether no file of a sharded checkpoint is missing or cut short."""
    for folder in (checkpoint / WEIGHTS, checkpoint / OPTIMIZER):
        try:
            found = dcp.FileSystemReader(folder).read_metadata()
            ends: dict[str, int] = {}
            for place in found.storage_data.values():
                end = place.offset + place.length
                ends[place.relative_path] = max(end, ends.get(place.relative_path, 0))
            if any((folder / name).stat().st_size < end for name, end in ends.items()):
                return False
        except Exception:  # whatever a pickle cut short happens to cause
            return False
    return True


def _read(found: dict[str, Any], folder: Path) -> None:
    """Fill ``found`` from ``folder``; without ranks, this process reads all of it.

    Raises:
        MorError: a file is missing or damaged, or it is the checkpoint of another network.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        try:
            dcp.load(found, checkpoint_id=folder)
        except (CheckpointException, OSError, RuntimeError, ValueError) as error:
            failures = getattr(error, "failures", {})  # the first rank's, its trace left out
            first = next(iter(failures.values()))[0] if failures else error
            line = " ".join(str(first).split())[:200]
            raise MorError(f"{folder} is missing a file or damaged: {line}") from error


def _weights(model: Any, **options: Any) -> dict[str, Any]:
    """The state dict by plain names, a tied head left out: it is the embedding."""
    found = get_model_state_dict(model, options=StateDictOptions(**options))
    if model.config.tie_word_embeddings:
        found.pop(_HEAD, None)
    return found


def _put_weights(model: Any, weights: dict[str, Any], **options: Any) -> None:
    """What :func:`_weights` gave, back; every weight has to be there."""
    if model.config.tie_word_embeddings:
        weights = weights | {_HEAD: weights["model.embed_tokens.weight"]}
    set_model_state_dict(model, weights, options=StateDictOptions(**options))


def save_shards(model: Any, checkpoint: Path) -> None:
    """Each rank writes its part of the weights; the first one the configuration."""
    dcp.save({"model": _weights(model)}, checkpoint_id=checkpoint / WEIGHTS)
    if dist.get_rank() == 0:
        model.config.save_pretrained(checkpoint)


def save_optimizer(model: nn.Module, optimizer: Any, checkpoint: Path) -> None:
    """Each rank writes its part of the optimiser's state."""
    found = get_optimizer_state_dict(model, optimizer)
    dcp.save({"optimizer": found}, checkpoint_id=checkpoint / OPTIMIZER)


def load_weights(model: Any, checkpoint: Path) -> None:
    """Weights and buffers from a checkpoint of either kind into a model of either kind."""
    if has_shards(checkpoint):
        found = {"model": _weights(model)}
        _read(found, checkpoint / WEIGHTS)
        _put_weights(model, found["model"])
        return
    weights = load_file(checkpoint / "model.safetensors")
    if isinstance(next(model.parameters()), DTensor):
        _put_weights(model, weights, full_state_dict=True)
        return
    if model.config.tie_word_embeddings:
        weights[_HEAD] = weights["model.embed_tokens.weight"]
    model.load_state_dict(weights)


def load_optimizer(model: nn.Module, optimizer: Any, checkpoint: Path) -> None:
    """The optimiser's state, likewise."""
    if has_shards(checkpoint):
        found = {"optimizer": get_optimizer_state_dict(model, optimizer)}
        _read(found, checkpoint / OPTIMIZER)
        set_optimizer_state_dict(model, optimizer, found["optimizer"])
        return
    found = torch.load(checkpoint / "optimizer.pt", map_location="cpu", weights_only=True)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for index, state in found["state"].items():
        parameter = parameters[index]
        for name, value in state.items():
            if isinstance(parameter, DTensor) and value.shape == parameter.shape:
                state[name] = distribute_tensor(
                    value.to(parameter.device), parameter.device_mesh, parameter.placements
                )
    optimizer.load_state_dict(found)


# One file -----------------------------------------------------------------------------------------


def _write(config: MoRConfig, weights: dict[str, Tensor], out: Path) -> None:
    """A model folder. The sharded class is one that torch made up: a plain one writes instead."""
    with torch.device("meta"):
        plain = MoRForCausalLM(config)
    plain.save_pretrained(out, state_dict=weights)


def save_whole(model: Any, out: Path) -> None:
    """Gather a sharded model on the first rank and write it for ``from_pretrained``."""
    weights = _weights(model, full_state_dict=True, cpu_offload=True)
    if dist.get_rank() == 0:
        _write(model.config, weights, out)


def merge(checkpoint: Path, out: Path, bos: Bos | None = None) -> None:
    """Write a checkpoint of either kind as a model folder with one safetensors file.

    One process, on the CPU, with one copy of the weights in memory.

    Args:
        checkpoint: its folder.
        out: the folder to write.
        bos: how texts begin, for a checkpoint whose configuration does not say it yet.

    Raises:
        MorError: ``checkpoint`` is not a checkpoint, or a file of it is missing or damaged.
    """
    if not (checkpoint / "config.json").is_file():
        raise MorError(f"{checkpoint} is no checkpoint: config.json is missing")
    config = MoRConfig.from_pretrained(checkpoint)
    model = MoRForCausalLM(config)
    try:
        load_weights(model, checkpoint)
    except MorError:
        raise
    except Exception as error:  # the libraries raise whatever a broken file happens to cause
        line = " ".join(str(error).split())[:200]
        raise MorError(f"{checkpoint} is missing a file or damaged: {line}") from error
    if bos is not None and config.add_bos_token is None:
        set_bos(model, bos)
    model.save_pretrained(out)
