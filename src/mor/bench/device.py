"""Where our own systems run, and in what type: from the words of the command line."""

from __future__ import annotations

import time

import torch

from mor.errors import MorError
from mor.ops import native
from mor.provenance import machine

CPU = torch.device("cpu")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def parse_device(text: str) -> torch.device:
    """The device that ``cpu``, ``cuda`` or ``cuda:N`` names.

    Raises:
        MorError: another word, or no such GPU here.
    """
    try:
        device = torch.device(text)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise MorError(f"device={text!r} is not known; use cpu, cuda or cuda:N")
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise MorError(f"device={text!r}, but torch sees no GPU here; use --device cpu")
        if (device.index or 0) >= torch.cuda.device_count():
            raise MorError(f"device={text!r}, but there are {torch.cuda.device_count()} GPUs")
    return device


def parse_dtype(text: str) -> torch.dtype:
    """The dtype that ``float32`` or ``bfloat16`` names.

    Raises:
        MorError: another word.
    """
    if text not in DTYPES:
        raise MorError(f"dtype={text!r} is not known; use one of: {', '.join(DTYPES)}")
    return DTYPES[text]


def dtype_name(dtype: torch.dtype) -> str:
    """The name of a dtype without ``torch.``."""
    return str(dtype).removeprefix("torch.")


def plain(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether it is float32 on the CPU: what the kernels, 8-bit weights and the peers need."""
    return device.type == "cpu" and dtype == torch.float32


def explain_no_int8(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why weights of 8 bits cannot run, if they cannot: the CPU's kernels alone know them."""
    if not plain(device, dtype):
        where = f"{dtype_name(dtype)} on {device.type}"
        return f"weights of 8 bits need the CPU kernels and float32 beside them, not {where}"
    if native.library() is None:
        return f"no kernels for weights of 8 bits: {native.missing()}"
    return None


def refuse_int8(device: torch.device, dtype: torch.dtype) -> None:
    """For a wish that no machine can fulfil.

    Raises:
        MorError: another device than the CPU, or another type than float32.
    """
    if not plain(device, dtype):
        why = explain_no_int8(device, dtype)
        raise MorError(f"int8: {why}; leave --int8 out, or use --device cpu --dtype float32")


def gpu_name(device: torch.device) -> str | None:
    """Name of the GPU, for records; None for the CPU, which they name anyway."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else None


def label(device: torch.device, dtype: torch.dtype) -> str:
    """For the screen: where and in what type."""
    return f"{dtype_name(dtype)} on {gpu_name(device) or machine()}"


def read_clock(device: torch.device) -> float:
    """Seconds, once the device has done all it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
