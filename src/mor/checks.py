"""Checks of single values, by name: every message names the field, its value and what is right.

Each check takes the exception to raise, so that a wrong configuration stays a ``ConfigError``.
"""

from __future__ import annotations

import math
import os
from typing import Any, get_args

from mor.errors import MorError

MAX_SEED = 2**32 - 1
"""The largest seed that NumPy takes; the other generators that we use take it too."""


def check_whole(
    name: str,
    value: Any,
    low: int,
    high: int | None = None,
    *,
    error: type[MorError] = MorError,
) -> None:
    """Refuse anything but a whole number from ``low`` to ``high``; True is no number.

    Raises:
        MorError: (or ``error``) naming field, value and what would be right.
    """
    right = f"of at least {low}" if high is None else f"in {low}..{high}"
    good = isinstance(value, int) and not isinstance(value, bool) and value >= low
    if not good or (high is not None and value > high):
        raise error(f"{name}={value!r} must be a whole number {right}")


def check_real(
    name: str,
    value: Any,
    low: float = -math.inf,
    high: float = math.inf,
    *,
    open_low: bool = False,
    open_high: bool = False,
    error: type[MorError] = MorError,
) -> None:
    """Refuse anything but a finite number between ``low`` and ``high``; True is no number.

    Args:
        name: of the field.
        value: what it holds.
        low, high: the smallest and the largest number that is right; infinite for no limit.
        open_low, open_high: leave out that limit itself.
        error: what to raise.

    Raises:
        MorError: (or ``error``) naming field, value and what would be right.
    """
    good = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if good and low <= value <= high:
        good = not (open_low and value == low) and not (open_high and value == high)
    else:
        good = False
    if not good:
        limits = []
        if not math.isinf(low):
            limits.append(f"above {low:g}" if open_low else f"of at least {low:g}")
        if not math.isinf(high):
            limits.append(f"below {high:g}" if open_high else f"at most {high:g}")
        right = f" {' and '.join(limits)}" if limits else ""
        raise error(f"{name}={value!r} must be a number{right}")


def check_flag(name: str, value: Any, *, error: type[MorError] = MorError) -> None:
    """Refuse anything but True and False.

    Raises:
        MorError: (or ``error``) naming field, value and what would be right.
    """
    if not isinstance(value, bool):
        raise error(f"{name}={value!r} must be true or false")


def check_choice(name: str, value: Any, choices: Any, *, error: type[MorError] = MorError) -> None:
    """Refuse a word that is not in a list of words or in a ``Literal``.

    Raises:
        MorError: (or ``error``) naming field, value and the words.
    """
    words = get_args(choices) or tuple(choices)
    if value not in words:
        raise error(f"{name}={value!r} is not known; use one of: {', '.join(map(str, words))}")


def is_on(variable: str, default: bool) -> bool:
    """Whether a switch in the environment is on: ``0``, ``off``, ``false`` and ``no`` turn it off.

    Args:
        variable: its name.
        default: where it is not set, or set to nothing.
    """
    text = os.environ.get(variable, "").strip().lower()
    return text not in ("0", "off", "false", "no") if text else default
