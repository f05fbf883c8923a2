"""How products are cut and fetched, chosen by measuring on the processor at hand.

Measured when weights are first packed, in about a second, and kept beside the compiled kernels.
No choice changes a result: every output is the same chain of sums.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from mor.disk import replace_file
from mor.errors import MorError
from mor.ops.native.build import library_file, processor
from mor.ops.native.calls import kernels

VARIABLE = "MOR_NATIVE_TUNING"
# Another choice than the first has to be better by this much: less is noise.
_GAIN = 1.03
_MOST = 1 << 20  # a GiB of rows
_SECONDS = 1.0


@dataclass(frozen=True)
class Tuning:
    """One choice.

    Attributes:
        rows_kib: rows of this size meet one panel of weights before the next.
        fetch: whether the next panel is fetched meanwhile.
    """

    rows_kib: int = 768
    fetch: bool = True

    def apply(self) -> None:
        """Products go this way from now on."""
        kernels().mor_tune(self.rows_kib << 10, int(self.fetch))


CANDIDATES = (
    Tuning(),
    Tuning(fetch=False),
    Tuning(rows_kib=256),
    Tuning(rows_kib=256, fetch=False),
    Tuning(rows_kib=1536),
    Tuning(rows_kib=1536, fetch=False),
)


def parse_tuning(text: str) -> Tuning | None:
    """``off`` (the first candidate), ``rows_kib=N,fetch=0|1``, or ``auto``: None, to be measured.

    Raises:
        MorError: anything else.
    """
    if text in ("", "auto"):
        return None
    if text == "off":
        return Tuning()
    parts = dict(part.partition("=")[::2] for part in text.split(","))
    rows, fetch = parts.pop("rows_kib", "768"), parts.pop("fetch", "1")
    number = int(rows) if rows.isdecimal() and len(rows) < 9 else 0
    if parts or not 1 <= number <= _MOST or fetch not in ("0", "1"):
        raise MorError(
            f"{VARIABLE}={text!r} must be auto, off, or rows_kib=N,fetch=0|1 with N in 1..{_MOST}"
        )
    return Tuning(number, fetch == "1")


def tune(measure: Callable[[Tuning], float]) -> Tuning:
    """Apply what the environment says, what was kept, or the best measured; and return it.

    Args:
        measure: seconds that the products take with a choice that is applied.
    """
    chosen = parse_tuning(os.environ.get(VARIABLE, ""))
    kept = _file()
    if chosen is None:
        chosen = _read(kept)
    if chosen is None:
        chosen = _best(measure)
        with suppress(OSError), replace_file(kept, contended=True) as made:
            made.write_text(json.dumps(asdict(chosen) | {"processor": processor()}) + "\n")
    chosen.apply()
    return chosen


def _best(measure: Callable[[Tuning], float]) -> Tuning:
    """The candidates take turns until the time is over, at least once round."""
    least = dict.fromkeys(CANDIDATES, math.inf)
    began = time.perf_counter()
    while True:
        for candidate in CANDIDATES:
            candidate.apply()
            least[candidate] = min(least[candidate], measure(candidate))
        if time.perf_counter() - began > _SECONDS:
            break
    best = min(least, key=lambda candidate: least[candidate])
    return best if least[best] * _GAIN < least[CANDIDATES[0]] else CANDIDATES[0]


def _file() -> Path:
    """Beside the library, which is there."""
    place = library_file()
    assert place is not None
    key = hashlib.sha256(f"{processor()} {torch.get_num_threads()}".encode()).hexdigest()[:8]
    return place.with_name(f"{place.stem}-tuning-{key}.json")


def _read(file: Path) -> Tuning | None:
    """What was kept; None where there is nothing of use."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        rows, fetch = found["rows_kib"], found["fetch"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    useful = type(rows) is int and 1 <= rows <= _MOST and type(fetch) is bool
    return Tuning(rows, fetch) if useful else None
