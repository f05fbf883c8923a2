"""The training FLOPs that runs with routes of their own really took, by the passes in their logs.

    python benchmarks/depth/spent.py runs/depth/NAME ...

A plan counts the capacities of the model. Under ``train.route_by_loss`` the router decides, so here
each stretch of the log counts with the share of tokens that ran each pass there. The exits that the
router is taught by are counted too: a forward pass of the coda for each but the last, and of the
head, which looks at places with a label alone, so that this is a little too much.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from mor.config import MoRConfig
from mor.model.flops import flops_per_token
from mor.train.recipe.file import load_recipe


def spent(run: Path) -> float:
    """FLOPs of all steps that the log of ``run`` tells."""
    recipe = load_recipe(str(run / "recipe.yaml"))
    config = MoRConfig.from_pretrained(run / "model")
    log = [json.loads(line) for line in (run / "log.jsonl").read_text("utf-8").splitlines()]
    total, before = 0.0, 0
    for line in log:
        if "router/active_fraction/0" not in line:
            continue
        depths = range(config.num_recursions)
        active = [line.get(f"router/active_fraction/{depth}", 0.0) for depth in depths]
        flops = flops_per_token(config, recipe.data.seq_len, active)
        tokens = line["tokens"] - before
        total += flops.training * tokens
        if recipe.train.route_by_loss is not None:
            total += (config.num_recursions - 1) * (flops.head + flops.coda) * tokens
        before = line["tokens"]
    return total


if __name__ == "__main__":
    for folder in map(Path, sys.argv[1:]):
        print(f"{folder}: {spent(folder):.3g}")
