"""Hops: what a pass is worth and what the router knows, as lines, a table and a picture.

    mor data prepare task:hops:documents=500000 --validation-fraction 0.004 --out runs/depth/hops
    mor train depth/hops-recursive
    mor train depth/hops-dense
    mor train depth/hops-untied
    mor train depth/hops-two
    mor uptrain depth/hops-router depth/hops-joint depth/hops-mor depth/hops-final
    mor eval runs/depth/NAME --data runs/depth/hops --batch-size 64
    python benchmarks/depth/hops.py collect runs/depth/hops-*     # runs/bench/depth.jsonl
    python benchmarks/depth/hops.py draw                          # docs/images/depth-hops.png

The harder size has the same stages by other names: depth/cycle-*, and `draw --family cycle`.
Formulas over cells are depth/formulas-* and `draw --family formulas` (or formulas-hard).

``--records benchmarks/results/depth.jsonl`` collects into the lines that come with the code, of
which the picture is drawn unless told otherwise. A line holds the answers of one finished run
(:mod:`mor.eval.answers`; of text its NLL), its size, its training FLOPs and where it came from.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from spent import spent  # beside this script

from mor.train.recipe.file import load_recipe

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "depth.jsonl"
IMAGES = ROOT / "docs" / "images"
KEPT = ("name", "family", "router", "parameters", "tokens", "steps", "train_flops", "seed")
FAMILIES = ("hops", "cycle", "formulas", "formulas-hard")
SCORES = ("causal", "depth_cap", "passes", "random_routes_nll")  # of text; nats per token
WHERE = ("commit", "machine", "versions", "command", "date")


def collect(folders: list[Path]) -> list[dict[str, Any]]:
    """One line per run folder that is finished and was evaluated on a task."""
    lines = []
    for folder in folders:
        if not (folder / "summary.json").is_file() or not (folder / "eval.json").is_file():
            print(f"{folder}: not a finished and evaluated run, left out")
            continue
        summary = json.loads((folder / "summary.json").read_text("utf-8"))
        scores = json.loads((folder / "eval.json").read_text("utf-8"))
        line = {key: summary.get(key) for key in KEPT}
        line |= {key: scores[key] for key in ("answers", *SCORES) if key in scores}
        if load_recipe(str(folder / "recipe.yaml")).train.route_by_loss is not None:
            line["spent_flops"] = spent(folder)  # train_flops is a plan, by the capacities
        line["trained"] = {key: summary[key] for key in WHERE if key in summary}
        lines.append(line | {key: scores[key] for key in WHERE if key in scores})
    return lines


def read_newest(records: Path) -> dict[tuple[str, int], dict[str, Any]]:
    """The newest line of every (run, seed)."""
    lines = [json.loads(text) for text in records.read_text("utf-8").splitlines()]
    return {(line["name"], line["seed"]): line for line in lines}


def print_table(lines: list[dict[str, Any]]) -> None:
    """Exact match by difficulty, depth and training FLOPs, as Markdown; a table per scale."""
    scales: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for line in lines:
        if line.get("answers"):
            scales.setdefault(tuple(line["answers"]["causal"]["by_level"]), []).append(line)
    for levels, own in scales.items():
        _print_scale(levels, own)


def _print_scale(levels: tuple[str, ...], lines: list[dict[str, Any]]) -> None:
    print(f"| run | exact match | {' | '.join(levels)} | passes, all tokens | training FLOPs |")
    print("|---|" + "---:|" * (len(levels) + 3))
    for line in lines:
        caps = line["answers"]["depth_cap"]
        rows = [(line["name"], line["answers"]["causal"])]
        if len(caps) > 1 and line["router"] == "fixed":
            rows = [(f"{line['name']}, at most {cap['max_depth']}", cap) for cap in caps]
        if line["answers"]["random_routes"]:
            rows.append((f"{line['name']}, routes by chance", line["answers"]["random_routes"]))
        for name, score in rows:
            shown = " | ".join(f"{score['by_level'][level]:.3f}" for level in levels)
            print(
                f"| {name} | {score['exact_match']:.4f} | {shown} | {score['mean_depth']:.2f} "
                f"| {line.get('spent_flops', line['train_flops']):.2e} |"
            )


def draw(found: dict[tuple[str, int], dict[str, Any]], family: str) -> None:
    """Left: exact match by hops for depth caps and controls. Right: depth by difficulty."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    by_name = {
        name: line["answers"]
        for (name, seed), line in found.items()
        if seed == 0 and "answers" in line  # texts have none
    }
    figure, (left, right) = plt.subplots(1, 2, figsize=(10.5, 4))
    shades = plt.get_cmap("viridis")
    names = [f"{family}-routed", f"{family}-final", f"{family}-propagate", family]
    routed = next(by_name[name] for name in names if name in by_name)
    trunk = by_name.get(f"{family}-recursive")  # without one, the routed model's own caps
    caps = (trunk or routed)["depth_cap"]
    for number, cap in enumerate(caps):
        passes = f"{cap['max_depth']} pass{'es' if cap['max_depth'] > 1 else ''}"
        label = f"{'trunk' if trunk else 'MoR'}, at most {passes}"
        color = shades(0.85 - 0.75 * number / max(1, len(caps) - 1))
        left.plot(*_line(cap["by_level"]), "o-", color=color, label=label, markersize=4)
    others = {
        f"{family}-dense": ("dense, the same weights", "--", "grey"),
        f"{family}-two": ("trained for two passes", "-.", "grey"),
        f"{family}-three": ("trained for three passes", "-.", "grey"),
        f"{family}-four": ("trained for four passes", "-.", "black"),
        f"{family}-twelve": ("trained for twelve passes", "--", "black"),
        f"{family}-untied": ("as many layers as passes", ":", "black"),
    }
    for name, (label, style, color) in others.items():
        if name in by_name:
            left.plot(*_line(by_name[name]["causal"]["by_level"]), style, color=color, label=label)
    share = routed["causal"]["mean_depth"] / len(caps)
    label = f"MoR, {share:.0%} of the passes"
    left.plot(*_line(routed["causal"]["by_level"]), "s-", color="crimson", label=label)
    chance = routed["random_routes"]["by_level"]
    left.plot(*_line(chance), "s:", color="crimson", alpha=0.5, label="MoR, routes by chance")
    difficulty = "formulas, one upon the other" if family.startswith("formulas") else "hops"
    left.set(xlabel=difficulty, ylabel="exact match", ylim=(0, 1.03))
    right.plot(*_line(routed["causal"]["depth_by_level"]), "s-", color="crimson")
    right.set(
        xlabel=difficulty, ylabel="passes that the router gives a query", ylim=(0.9, len(caps))
    )
    lines, labels = left.get_legend_handles_labels()
    figure.legend(lines, labels, loc="lower center", ncol=5, fontsize=8)
    figure.tight_layout(rect=(0, 0.03 + 0.045 * -(-len(labels) // 5), 1, 1))
    figure.savefig(IMAGES / f"depth-{family}.png", dpi=130)
    print(IMAGES / f"depth-{family}.png")


def _line(scores: dict[str, float]) -> tuple[list[int], list[float]]:
    return [int(level) for level in scores], list(scores.values())


def main() -> None:
    """Collect lines, or draw them."""
    parser = argparse.ArgumentParser(description="results of the hops runs")
    commands = parser.add_subparsers(dest="what", required=True)
    collecting, drawing = commands.add_parser("collect"), commands.add_parser("draw")
    collecting.add_argument("folders", nargs="+", type=Path)
    collecting.add_argument("--records", type=Path, default=Path("runs/bench/depth.jsonl"))
    drawing.add_argument("--records", type=Path, default=RESULTS)
    drawing.add_argument("--family", choices=FAMILIES, default="hops")
    options = parser.parse_args()
    if options.what == "collect":
        options.records.parent.mkdir(parents=True, exist_ok=True)
        with options.records.open("a", encoding="utf-8") as file:
            for line in collect(options.folders):
                file.write(json.dumps(line) + "\n")
    found = read_newest(options.records)
    print_table(list(found.values()))
    if options.what == "draw":
        draw(found, options.family)


if __name__ == "__main__":
    main()
