"""Which form of paged attention an engine runs: by device, types and what is installed."""

from __future__ import annotations

import logging
from typing import Literal, NamedTuple, get_args

import torch

from mor.checks import check_choice
from mor.config import MoRConfig
from mor.engine.attend import (
    PagedAttention,
    native_attention,
    padded_attention,
    row_attention,
)
from mor.engine.device import DeviceAttention, FlashInferAttention
from mor.errors import MorError
from mor.ops import native
from mor.ops.paged import (
    activate_flash,
    missing_flash,
    missing_flashinfer,
    plain_attention,
    varlen_attention,
)
from mor.ops.planned import explain_no_triton

log = logging.getLogger("mor.engine")

AttentionName = Literal[
    "auto", "plain", "padded", "rows", "native", "varlen", "flashinfer", "triton"
]
"""Forms of paged attention; docs/engine.md says what each is for."""

# What ``auto`` tries, in order; the last needs nothing.
_ORDER = {"cpu": ("native", "rows"), "cuda": ("varlen", "flashinfer", "triton", "plain")}
_HALF = (torch.bfloat16, torch.float16)


class Setting(NamedTuple):
    """What a form must be able to do.

    Attributes:
        config: the model's.
        device: where it runs.
        dtype: of weights and queries.
        entries: of keys and values in the pool.
    """

    config: MoRConfig
    device: torch.device
    dtype: torch.dtype
    entries: torch.dtype


def choose_attention(
    asked: AttentionName | PagedAttention | None, setting: Setting
) -> PagedAttention:
    """The form that was asked for, or the best one; its name goes to the log ``mor.engine``.

    Raises:
        MorError: no such name, or the form cannot run here; it says why.
    """
    if callable(asked):
        log.info("attention over pages: %s, as given", name_of(asked))
        return asked
    name: str = "auto" if asked is None else asked
    check_choice("attention", name, AttentionName)
    if name == "auto":
        reasons = []
        for one in _ORDER.get(setting.device.type, ("padded",)):
            reason = explain_missing(one, setting)
            if reason is None:
                break
            reasons.append(f"not {one}: {reason}")
        name, why = one, "; ".join(reasons)
    else:
        reason = explain_missing(name, setting)
        if reason is not None:
            raise MorError(f"attention={name!r} cannot run here: {reason}")
        why = "as asked"
    log.info("attention over pages: %s%s", name, f" ({why})" if why else "")
    return _make(name, setting)


def name_of(form: PagedAttention) -> str:
    """The name of a form, also of one that is not ours."""
    for name, own in _FUNCTIONS.items():
        if form is own:
            return name
    return str(getattr(form, "name", None) or getattr(form, "__name__", type(form).__name__))


def explain_missing(name: str, setting: Setting) -> str | None:
    """Why the form ``name`` cannot run; None where it can."""
    device, head_dim = setting.device, setting.config.head_dim
    if name in ("plain", "padded", "rows"):
        return None
    if name == "native":
        if device.type != "cpu":
            return f"it is for the CPU, and the model is on {device}"
        if native.library() is None:
            return native.missing()
        known = ", ".join(map(str, native.HEAD_DIMS))
        return None if head_dim in native.HEAD_DIMS else f"head_dim={head_dim} is none of {known}"
    if name == "triton":
        return explain_no_triton(device, setting.dtype)
    if device.type != "cuda":
        return f"it is for NVIDIA's GPUs, and the model is on {device}"
    if setting.dtype not in _HALF or setting.entries != setting.dtype:
        types = f"weights are {setting.dtype} and keys and values {setting.entries}"
        return f"it takes bfloat16 or float16 for weights and cache alike; {types}"
    capability = torch.cuda.get_device_capability(device)
    if name == "varlen":
        fits = head_dim % 8 == 0 and head_dim <= 256
        return missing_flash(capability) if fits else f"head_dim={head_dim} is no multiple of 8"
    fits = head_dim in (64, 128, 256)
    reason = None if fits else f"head_dim={head_dim} is none of 64, 128, 256"
    return reason or missing_flashinfer(capability)


_FUNCTIONS: dict[str, PagedAttention] = {
    "padded": padded_attention,
    "rows": row_attention,
    "native": native_attention,
}


def _make(name: str, setting: Setting) -> PagedAttention:
    if name in _FUNCTIONS:
        return _FUNCTIONS[name]
    if name == "flashinfer":
        return FlashInferAttention(setting.config, setting.dtype, setting.device)
    if name == "varlen":
        activate_flash(torch.cuda.get_device_capability(setting.device))
        return DeviceAttention(name, varlen_attention)
    if name == "triton":
        # Here: it compiles at the first call, and machines without Triton run the other forms.
        from mor.ops.paged.kernel import triton_attention

        return DeviceAttention(name, triton_attention)
    return DeviceAttention("plain", plain_attention)


NAMES: tuple[str, ...] = get_args(AttentionName)
