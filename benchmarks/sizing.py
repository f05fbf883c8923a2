"""The tables of docs/sizing.md, from the cost model: `python benchmarks/sizing.py --shape 360m`."""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import torch

from mor.bench.sizing import (
    GIB,
    MACHINES,
    bytes_per_token,
    pages_per_gib,
    requests_per_second,
)
from mor.config.presets import preset

# Names and shares of tokens that run each of three recursions.
DEPTHS = {
    "all three": (1.0, 1.0, 1.0),
    "as planned (1, 2/3, 1/3)": (1.0, 2 / 3, 1 / 3),
    "one": (1.0, 0.0, 0.0),
}
PROMPT, NEW = 512, 128


def memory_table(shape: str) -> Iterator[str]:
    """Pages and tokens per GiB, by the depths that tokens run."""
    yield "| model | depths | pages per GiB | tokens per GiB, float32 | bfloat16 | int8 |"
    yield "|---|---|---:|---:|---:|---:|"
    models = {"vanilla": ("vanilla", {"every layer": (1.0,)}), "MoR, R = 3": ("mor", DEPTHS)}
    for name, (family, depths) in models.items():
        config = preset(shape, family)
        for told, shares in depths.items():
            held = [
                f"{GIB / bytes_per_token(config, shares, dtype):,.0f}"
                for dtype in (torch.float32, torch.bfloat16, torch.int8)
            ]
            yield f"| {name} | {told} | {pages_per_gib(config):,} | {' | '.join(held)} |"


def rate_table(shape: str) -> Iterator[str]:
    """Requests per second of each machine, by the depths that tokens run."""
    yield "| model | depths | " + " | ".join(machine.name for machine in MACHINES) + " |"
    yield "|---|---|" + "---:|" * len(MACHINES)
    rows = [("vanilla", "every layer", preset(shape, "vanilla"), (1.0,))]
    rows += [("MoR, R = 3", told, preset(shape, "mor"), shares) for told, shares in DEPTHS.items()]
    for name, told, config, shares in rows:
        cells = []
        for machine in MACHINES:
            batch = 16 if "core" in machine.name else 256
            rate = requests_per_second(config, machine, shares, PROMPT, NEW, batch)
            cells.append(f"{rate:.2f}" if rate < 10 else f"{rate:,.0f}")
        yield f"| {name} | {told} | {' | '.join(cells)} |"


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", default="360m")
    shape = parser.parse_args().shape
    print(*memory_table(shape), "", *rate_table(shape), sep="\n")


if __name__ == "__main__":
    main()
