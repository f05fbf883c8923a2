"""The recipes of the paper's runs, and the table of what they cost in docs/reproduction.md.

    python tools/paper_recipes.py            # writes what differs; the recipes of 360M are older

Steps follow from 16.5e18 FLOPs in the paper's own way of counting (mor.model.flops), rounded up as
the published 360M step counts are; warm-up is 5% of the steps that 2e18 FLOPs allow, cool-down a
fifth. A test holds files and table to what this makes.
"""

from __future__ import annotations

import math
from pathlib import Path

from mor.config.presets import SHAPES, preset
from mor.model.flops import count_parameters, flops_per_token
from mor.recipes import FOLDER
from mor.train import Recipe, load_recipe
from mor.train.plan.budget import plan_budget

PAGE = Path(__file__).parents[1] / "docs/reproduction.md"
MARKS = "<!-- costs: made by tools/paper_recipes.py -->", "<!-- costs end -->"
BUDGETS = 2e18, 5e18, 16.5e18
SEQ_LEN, SEQUENCES = 2048, 1024
PEAK, HOUR = 989.4e12, 3600.0
"""Dense bfloat16 FLOPs per second of an H100 SXM."""
UTILISATION = {1: 0.40, 8: 0.38, 64: 0.33}
"""Assumed, not measured: model FLOPs utilisation by number of devices."""

PUBLISHED_STEPS = {("135m", "expert-3"): 36326}
"""Where rounding ends elsewhere."""

# Model fields on top of the preset, by row of the paper's main table.
ROWS: dict[str, dict[str, object]] = {
    "vanilla": {"family": "vanilla"},
    "recursive-2": {"family": "recursive", "num_recursions": 2},
    "recursive-3": {"family": "recursive", "num_recursions": 3},
    "recursive-4": {"family": "recursive", "num_recursions": 4},
    "expert-2": {"family": "mor", "num_recursions": 2},
    "expert-3": {"family": "mor", "num_recursions": 3},
    "expert-4": {"family": "mor", "num_recursions": 4},
    "expert-3-kv": {"family": "mor", "num_recursions": 3, "kv_sharing": "recursive"},
    "token-3": {
        "family": "mor",
        "num_recursions": 3,
        "router": "token_choice",
        "router_balancing_loss_coef": 0.1,
        "router_z_loss_coef": "1.0e-5",
    },
}
# Published validation NLL at 2e18, 5e18 and 16.5e18 FLOPs, R = 3.
NLL: dict[str, dict[str, tuple[float, float, float]]] = {
    "135m": {
        "vanilla": (3.0922, 2.9464, 2.8432),
        "recursive-3": (3.2058, 3.0534, 2.9552),
        "expert-3": (3.1077, 3.0192, 2.9490),
    },
    "360m": {
        "vanilla": (3.3785, 3.0097, 2.7824),
        "recursive-3": (3.4864, 3.0722, 2.8466),
        "expert-3": (3.1026, 2.9161, 2.7924),
    },
    "730m": {
        "vanilla": (3.7164, 3.0821, 2.7048),
        "recursive-3": (3.8136, 3.1640, 2.7886),
        "expert-3": (3.3300, 3.0067, 2.7438),
    },
    "1.7b": {
        "vanilla": (5.1349, 3.6926, 2.8658),
        "recursive-3": (5.3277, 3.8876, 3.0042),
        "expert-3": (4.1175, 3.2905, 2.8316),
    },
}
ROWS_360M = {
    "recursive-2": 2.8079,
    "recursive-4": 2.8781,
    "expert-2": 2.7511,
    "expert-4": 2.8204,
    "expert-3-kv": 2.7983,
    "token-3": 2.9163,
}


def steps_of(size: str, row: str) -> list[int]:
    """Optimiser steps at each of the paper's budgets."""
    fields = {name: value for name, value in ROWS[row].items() if name != "family"}
    if "router_z_loss_coef" in fields:
        fields["router_z_loss_coef"] = 1e-5
    config = preset(size, str(ROWS[row]["family"]), **fields)
    one = flops_per_token(config, SEQ_LEN, convention="paper").training * SEQ_LEN * SEQUENCES
    steps = [math.ceil(budget / one) for budget in BUDGETS]
    return [*steps[:-1], PUBLISHED_STEPS.get((size, row), steps[-1])]


def published(size: str, row: str) -> list[float] | None:
    """Published NLL by budget; None where the paper has none."""
    found = NLL[size].get(row)
    return None if found is None else list(found)


def recipe_text(size: str, row: str, budgets: bool = False) -> str:
    """The recipe of one run; with ``budgets``, with a branch for each smaller one."""
    steps, said = steps_of(size, row), published(size, row)
    micro = 16 if size in ("135m", "360m") else 8
    fields = ", ".join(f"{name}: {value}" for name, value in ROWS[row].items())
    comment = f"# {size} at 16.5e18 FLOPs as the paper counts them"
    if budgets:
        comment = f"# {size} at 2e18, 5e18 and 16.5e18 FLOPs as the paper counts them, one run"
    listed = "" if said is None else " / ".join(f"{nll:.4f}" for nll in said)
    known = f"published NLL {listed if budgets else f'{said[-1]:.4f}'}" if said else None
    comment += f"; {known}.\n" if known else ";\n# the paper has no number for this row.\n"
    name = f"paper-{'budgets-' if budgets else ''}{size}-{row}"
    branches = f"  branches: [{{steps: {steps[0]}}}, {{steps: {steps[1]}}}]\n" if budgets else ""
    return (
        f"{comment}name: {name}\n"
        f"model: {{preset: {size}, {fields}}}\n"
        "data: {path: data/fineweb-edu-dedup, seq_len: 2048}\n"
        "train:\n"
        f"  budget: {{steps: {steps[-1]}}}\n{branches}"
        f"  batch_size: {micro}\n"
        f"  global_batch_size: {SEQUENCES}\n"
        "  learning_rate: 3.0e-3\n"
        f"  warmup_steps: {round(0.05 * steps[0])}\n"
        "  decay_fraction: 0.2\n"
        "  dtype: bfloat16\n"
        f"  save_steps: {max(1, steps[-1] // 10)}\n"
        f"  eval_steps: {max(1, steps[-1] // 10)}\n"
    )


def files() -> dict[Path, str]:
    """Every recipe that this makes: those of 360M are the published ones, and older."""
    made = {}
    for size in SHAPES:
        for row in ROWS:
            if size != "360m":
                made[FOLDER / f"paper/{size}-{row}.yaml"] = recipe_text(size, row)
            if row in NLL[size]:
                path = FOLDER / f"paper/budgets/{size}-{row}.yaml"
                made[path] = recipe_text(size, row, budgets=True)
    return made


def cost_table() -> str:
    """A line for each run: what the model is, what it takes, and days on 1, 8 and 64 H100."""
    lines = [
        "| recipe | weights without embedding | steps | tokens | training FLOPs "
        "| days on 1 H100 | hours on 8 | hours on 64 | published NLL |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for size in SHAPES:
        for row in ROWS:
            lines.append(_cost_line(size, row))
    return "\n".join(lines)


def _cost_line(size: str, row: str) -> str:
    recipe: Recipe = load_recipe(f"paper/{size}-{row}")
    config = recipe.model_config_for(49152, 0)
    plan = plan_budget(recipe.train.budget, config, SEQ_LEN, SEQ_LEN * SEQUENCES)
    hours = {n: plan.flops / (PEAK * share * n) / HOUR for n, share in UTILISATION.items()}
    nll = (published(size, row) or [None])[-1]
    if size == "360m":
        nll = nll or ROWS_360M[row]
    return (
        f"| `paper/{size}-{row}` | {count_parameters(config)[1] / 1e6:,.0f}M | {plan.steps:,} "
        f"| {plan.tokens / 1e9:.1f}B | {plan.flops:.2e} | {hours[1] / 24:.1f} "
        f"| {hours[8]:.1f} | {hours[64]:.1f} | {'-' if nll is None else f'{nll:.4f}'} |"
    )


def page_text(before: str) -> str:
    """The page with its table made again."""
    head, _, rest = before.partition(MARKS[0])
    return f"{head}{MARKS[0]}\n\n{cost_table()}\n\n{MARKS[1]}{rest.partition(MARKS[1])[2]}"


def main() -> None:
    """Write what differs."""
    for path, text in files().items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    PAGE.write_text(page_text(PAGE.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
