"""The paper authors' checkpoints: their configuration sections and tensor names, read as ours.

Their layout (released code of August 2025): ``hf_config`` is a plain Llama configuration of the
unrolled stack; ``recursive``, ``kv_sharing`` and ``mor`` say what is shared and how it is routed.
Every unrolled layer has its own names, so that a shared tensor is stored R times.
"""

from __future__ import annotations

import math
import warnings
from typing import Any, get_args

from torch import Tensor

from mor.config import MoRConfig
from mor.config.choices import RouterArchitecture, Sharing
from mor.folder.weights import ConversionError
from mor.hf.convert.assemble import Plan, stack_plan, trunk_plan
from mor.hf.convert.llama import llama_fields, plain_depth
from mor.model.sharing import recursion_config


class Section:
    """One section of their configuration, read with its name in every message."""

    def __init__(self, parent: dict[str, Any], name: str, where: str) -> None:
        self.name, self.where = name, where
        content = parent.get(name.rpartition(".")[2])
        if content is None:
            content = {}
        if not isinstance(content, dict):
            raise self.wrong(None, "must be a section of fields", content)
        self.content: dict[str, Any] = content

    def wrong(self, field: str | None, right: str, value: Any) -> ConversionError:
        """The error that names a field, its value and what would be right."""
        name = f"{self.name}.{field}" if field else self.name
        return ConversionError(f"{self.where}: {name}={value!r} {right}")

    def flag(self, field: str, default: bool) -> bool:
        """Field ``field``, which must be true or false."""
        value = self.content.get(field)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.wrong(field, "must be true or false", value)
        return value

    def number(self, field: str, default: float | None) -> float:
        """A number; YAML reads 1e-5 as text, so text that is a number counts."""
        value = self.content.get(field)
        value = default if value is None else value
        try:
            number = float(value)  # type: ignore[arg-type]  # None ends in the message below
        except (TypeError, ValueError):
            number = math.nan
        if isinstance(value, bool) or not math.isfinite(number):
            raise self.wrong(field, "must be a number", value)
        return number

    def whole(self, field: str, default: int | None) -> int:
        """A whole number of at least 0."""
        value = self.content.get(field)
        value = default if value is None else value
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise self.wrong(field, "must be a whole number of at least 0", value)
        return value

    def choice(self, field: str, allowed: tuple[str | None, ...], default: str | None) -> Any:
        """One of ``allowed``; a missing field is ``default``, an explicit null is None."""
        value = self.content.get(field, default)
        if value not in allowed:
            names = ", ".join("null" if a is None else str(a) for a in allowed)
            raise self.wrong(field, f"is not known; use one of: {names}", value)
        return value


def authors_config(raw: dict[str, Any], llama: dict[str, Any], where: str) -> MoRConfig:
    """The configuration of ours that says what the authors' one does.

    Args:
        raw: their sections ``recursive``, ``kv_sharing``, ``mor``; one that is missing is off.
        llama: the Llama configuration of the unrolled stack.
        where: what to call the configuration in messages.

    Raises:
        ConversionError, ConfigError: naming the field.
    """
    if Section(raw, "relaxation", where).flag("enable", False):
        raise ConversionError(
            f"{where}: relaxation.enable=true: LoRA, prompts and recursion encodings cannot be "
            "converted"
        )
    fields = llama_fields(llama, where)
    layers = llama["num_hidden_layers"]
    recursive, mor = Section(raw, "recursive", where), Section(raw, "mor", where)
    fields |= _depth(recursive, layers)
    fields["kv_sharing"] = _kv_sharing(raw, llama, fields, where)
    if mor.flag("enable", False):
        if fields["num_recursions"] < 2:
            raise mor.wrong("enable", "needs recursive.enable and num_recursion of 2 or more", True)
        fields |= _routing(raw, mor, fields, where)
    return MoRConfig(**fields)


def _depth(recursive: Section, layers: int) -> dict[str, Any]:
    """Depth and sharing; thinned as their code does, whether ``layers`` counts before or after."""
    if not recursive.flag("enable", False):
        return plain_depth(layers)
    recursions = recursive.whole("num_recursion", None)
    sharing = recursive.choice("sharing", get_args(Sharing), None)
    if recursions == 1:
        # A plain model started from a large one; its stack was cut to base_depth layers.
        return plain_depth(recursive.whole("base_depth", layers))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        depth = recursion_config(layers, recursions, sharing, thin=True)
    return depth | {"share_norms": recursive.flag("ln_share", True)}


def _kv_sharing(
    raw: dict[str, Any], llama: dict[str, Any], fields: dict[str, Any], where: str
) -> str:
    # Their saved config.json carries this one section too.
    section = Section(raw if "kv_sharing" in raw else llama, "kv_sharing", where)
    if not section.flag("enable", False):
        return "none"
    for name, value in (
        ("num_recursion", fields["num_recursions"]),
        ("sharing", fields["sharing"]),
    ):
        found = section.content.get(name)
        if fields["num_recursions"] == 1 or found not in (None, value):
            raise section.wrong(name, f"must be that of the recursive section: {value!r}", found)
    if llama.get("use_cache") is False:
        raise ConversionError(
            f"{where}: use_cache=false switched kv_sharing off in the authors' code; set "
            "kv_sharing.enable to false (as it ran), or use_cache to true"
        )
    if not section.flag("update_cache", False):
        return "recursive"
    mor = Section(raw, "mor", where)
    expert = mor.flag("enable", False) and mor.content.get("type") == "expert"
    if not expert or fields["sharing"] != "middle_cycle":
        raise section.wrong(
            "update_cache", "is defined for expert choice with middle_cycle alone", True
        )
    return "recursive_update"


def _routing(
    raw: dict[str, Any], mor: Section, fields: dict[str, Any], where: str
) -> dict[str, Any]:
    kind = mor.choice("type", ("expert", "token"), None)
    own = Section(mor.content, f"mor.{kind}", where)
    allowed = ("cycle", "middle_cycle") if kind == "expert" else ("middle_cycle",)
    if fields["sharing"] not in allowed:
        raise ConversionError(
            f"{where}: recursive.sharing={fields['sharing']!r} does not fit mor.type={kind!r}; "
            f"use {' or '.join(allowed)}"
        )
    routing = {
        "router_architecture": mor.choice("router_type", get_args(RouterArchitecture), "linear"),
        "router_temperature": mor.number("temp", 1.0),
        "router_z_loss_coef": mor.number("z_coeff", None) if mor.flag("z_loss", False) else 0.0,
        "update_rule": "gated"
        if own.content.get("gating", "weighted") == "weighted"
        else "additive",
    }
    if kind == "token":
        if mor.flag("rand_router", False):
            raise mor.wrong("rand_router", "is defined for mor.type='expert' alone", True)
        return routing | _token_choice(raw, own)
    routing["router_capacities"] = _capacities(mor)
    return routing | _expert_choice(raw, mor, own)


def _capacities(mor: Section) -> list[float] | None:
    value = mor.content.get("capacity")
    if value is None:
        return None
    parts = value.split(",") if isinstance(value, str) else value
    try:
        return [float(part) for part in parts]
    except (TypeError, ValueError):
        raise mor.wrong("capacity", "must be numbers with commas between them", value) from None


def _expert_choice(raw: dict[str, Any], mor: Section, own: Section) -> dict[str, Any]:
    routing = {
        "router_alpha": own.number("alpha", 0.1),
        "router_capacity_warmup_steps": _warmup(raw, own, "cap_warmup_step"),
    }
    if mor.flag("rand_router", False):
        return routing | {"router": "random"}
    activation = own.choice("router_func", ("sigmoid", "tanh", None), "sigmoid")
    objective = own.choice("sampling", ("aux_loss", "aux_router", None), None)
    return routing | {
        "router": "expert_choice",
        "router_activation": activation or "none",
        "router_objective": objective or "none",
        "router_aux_loss_coef": own.number("coeff", 0.01),
    }


def _token_choice(raw: dict[str, Any], own: Section) -> dict[str, Any]:
    balancing = own.choice("balancing", ("loss", "loss_free", None), None)
    return {
        "router": "token_choice",
        "router_activation": own.choice("router_func", ("softmax", "sigmoid"), "softmax"),
        "router_alpha": own.number("alpha", 1.0),
        "router_balancing": balancing or "none",
        "router_balancing_loss_coef": own.number("coeff", 0.01),
        "router_bias_update_rate": own.number("u", 0.001),
        "router_balance_warmup_steps": _warmup(raw, own, "bal_warmup_step"),
    }


def _warmup(raw: dict[str, Any], own: Section, field: str) -> int:
    """Warm-up in optimiser steps; null stands for the learning rate's. Their capacity warm-up
    counts micro-batches: the number is kept, as a checkpoint does not tell how many make a step.
    """
    steps = raw.get("num_warmup_steps")
    return own.whole(field, steps if isinstance(steps, int) else 0)


def authors_plan(config: MoRConfig) -> Plan:
    """Which of their tensors feed which of ours."""
    if config.router == "fixed":
        return stack_plan(config)
    first = config.num_prelude_layers
    token = config.router == "token_choice"

    def block(unrolled: int) -> str:
        depth, layer = divmod(unrolled, config.num_recursion_layers)
        if token:
            return f"model.layers.{first}.block_list.{depth}.{layer}"
        return f"model.layers.{first + depth}.block.{layer}"

    after = first + (1 if token else config.num_recursions)
    plan = trunk_plan(
        config, block, prelude="model.layers.", coda=lambda i: f"model.layers.{after + i}"
    )
    if config.router == "random":
        return plan
    routers = [first] if token else [first + r for r in range(config.num_recursions)]
    modules = [("net", "mor_router")]
    if config.router == "expert_choice" and config.router_objective == "aux_router":
        modules.append(("auxiliary", "mlp_router"))
    if config.router_architecture == "linear":
        tensors = [("weight", "router.weight")]
    else:
        tensors = [("up", "router.0.weight"), ("weight", "router.2.weight")]
    for ours, theirs in modules:
        for mine, yours in tensors:
            for index, layer in enumerate(routers):
                name = f"model.layers.{layer}.{theirs}.{yours}"
                plan[f"model.router.{ours}.{mine}", index] = [name]
    if token and config.router_balancing == "loss_free":
        plan["model.router.bias", None] = [f"model.layers.{first}.router_bias"]
    return plan


def drop_unused(config: MoRConfig, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """``weights`` without modules that their code makes but this configuration never uses."""
    unused: tuple[str, ...] = ()
    if config.router == "random":
        unused += (".mor_router.",)
    if config.router == "token_choice" and config.router_balancing != "loss_free":
        unused += (".router_bias",)
    return {name: t for name, t in weights.items() if not any(part in name for part in unused)}
