"""Tokens per second for a plan: from the newest log of the same recipe, or from a short probe."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import default_data_collator

from mor.config import MoRConfig
from mor.errors import MorError
from mor.hf.modeling import MoRForCausalLM
from mor.ops.ranks import world_size
from mor.run_files import LOG, RECIPE, SUMMARY
from mor.train.data import open_run_data
from mor.train.logs.meter import peak_memory_bytes
from mor.train.plan.budget import warmup_steps
from mor.train.recipe.fields import Decides, fields_that_decide
from mor.train.recipe.recipe import Recipe, parse_recipe
from mor.train.recipe.sections import Section, TrainSection
from mor.train.recipe.uptrain import UptrainSection

# What a field must decide for a log of other values to tell nothing about the speed.
_OF_SPEED: tuple[Decides, ...] = ("speed", "weights and speed", "batch split")


@dataclass(frozen=True)
class Speed:
    """A measured speed.

    Attributes:
        tokens_per_s: over all devices.
        source: where it comes from, for the reader of a plan.
        peak_memory_bytes: of the process (or GPU) that was measured, where known.
    """

    tokens_per_s: float
    source: str
    peak_memory_bytes: int | None = None


def logged_speed(recipe: Recipe) -> Speed | None:
    """The last speed in the newest log under ``recipe.output`` of a run with the same recipe.

    The same is: model, data, what uptraining freezes and asks of a teacher, and every field of
    ``train`` but those of the optimiser, of the length and of bookkeeping. None where there is no
    such log.
    """
    wanted = _decides(recipe)
    found = []
    for path in sorted(recipe.output.expanduser().glob(f"*/{LOG}")):
        folder = path.parent
        try:
            text = (folder / RECIPE).read_text(encoding="utf-8")
            if _decides(parse_recipe(yaml.safe_load(text))) != wanted:
                continue
            entries = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
            last = [entry for entry in entries if entry.get("tokens_per_s")][-1]
        except (OSError, ValueError, AttributeError, IndexError, yaml.YAMLError):
            continue  # no run of ours, or one that is cut short
        found.append((path.stat().st_mtime, folder, last))
    if not found:
        return None
    _, folder, last = max(found, key=lambda one: one[0])
    where = _machine(folder)
    source = f"log of {folder}, step {last['step']}" + (f", on {where}" if where else "")
    return Speed(float(last["tokens_per_s"]), source, last.get("peak_memory_bytes"))


def _decides(recipe: Recipe) -> dict[str, Any]:
    fields = recipe.model_dump(mode="json")

    def kept(name: str, section: type[Section]) -> Any:
        names = fields_that_decide(section, *_OF_SPEED)
        return fields[name] and {n: v for n, v in fields[name].items() if n in names}

    train, up = kept("train", TrainSection), kept("uptrain", UptrainSection)
    return {"model": fields["model"], "data": fields["data"], "train": train, "uptrain": up}


def _machine(folder: Path) -> str | None:
    try:
        return json.loads((folder / SUMMARY).read_text(encoding="utf-8")).get("machine")
    except (OSError, ValueError):
        return None


def probe_speed(recipe: Recipe, config: MoRConfig, rounds: int = 3) -> Speed:
    """Time a few micro-batches and optimiser steps of this recipe on this machine.

    Forward, backward and AdamW on the first sequences of the data, after one step that is not
    counted; medians. Reading data, logging, saving and the exchange between ranks are left out, and
    several devices are taken to be as fast as so many times one.

    Raises:
        MorError: there is no data, or the memory does not suffice.
    """
    section, data = recipe.train, recipe.data
    if section.threads:
        torch.set_num_threads(section.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    samples = open_run_data(recipe, section.batch_size).samples
    rows = default_data_collator(samples.__getitems__(range(section.batch_size)))
    batch = {name: tensor.to(device) for name, tensor in rows.items()}
    try:
        micro, step = _times(recipe, config, batch, rounds)
    except torch.OutOfMemoryError:
        raise MorError(
            f"train.batch_size={section.batch_size} does not fit into the memory of "
            f"{torch.cuda.get_device_name()}; lower it and raise gradient_accumulation_steps, or "
            "set train.gradient_checkpointing"
        ) from None
    world = world_size()
    tokens = recipe.sequences_per_step(world) * data.seq_len
    seconds = section.accumulation(world) * micro + step
    name = torch.cuda.get_device_name() if device.type == "cuda" else "this CPU"
    threads = "" if device.type == "cuda" else f", {torch.get_num_threads()} threads"
    source = f"probe of {rounds} steps on {name}{threads}"
    return Speed(tokens / seconds, source, peak_memory_bytes())


def _times(
    recipe: Recipe, config: MoRConfig, batch: dict[str, torch.Tensor], rounds: int
) -> tuple[float, float]:
    """Median seconds of a micro-batch, forward and backward, and of an optimiser step."""
    section = recipe.train
    model = MoRForCausalLM(config).train()
    device = batch["input_ids"].device
    model.to(device)
    model.model.gradient_checkpointing = section.gradient_checkpointing
    model.model.use_compiled_layers(section.compile)
    model.model.router.begin_step(warmup_steps(config))
    optimizer = torch.optim.AdamW(model.parameters(), lr=section.learning_rate)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=section.dtype == "bfloat16")

    def micro() -> None:
        with autocast:
            loss = model(**batch, use_cache=False, return_logits=False).loss
        loss.backward()

    def step() -> None:
        optimizer.step()
        optimizer.zero_grad()
        model.model.router.finish_step()

    times = [(_seconds(micro), _seconds(step)) for _ in range(1 + rounds)][1:]
    return statistics.median(t[0] for t in times), statistics.median(t[1] for t in times)


def _seconds(work: Callable[[], None]) -> float:
    def now() -> float:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter()

    began = now()
    work()
    return now() - began
