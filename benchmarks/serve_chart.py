"""The README's picture of serving speed, from the recorded runs.

    python benchmarks/serve_chart.py          # docs/images/serve-speed.png

Reads ``benchmarks/results/serve.jsonl``: 32 clients at the 135M and 360M shapes, in float32 and
with weights of 8 bits, on two makers' processors. A bar is the median of the rounds, its line the
slowest and the fastest where they were kept.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "serve.jsonl"
IMAGE = ROOT / "docs" / "images" / "serve-speed.png"
# The runs of the picture: processor, shape, width of the weights, and the commit that was measured.
PANELS = (
    ("Intel Xeon", "135m", "", "0f59208"),
    ("Intel Xeon", "135m", ":int8", "0f59208"),
    ("AMD EPYC", "135m", "", "5313e8c"),
    ("AMD EPYC", "135m", ":int8", "d2b0458"),
    ("Intel Xeon", "360m", "", "ba1f475"),
    ("Intel Xeon", "360m", ":int8", "ba1f475"),
)
WEIGHTS = {"": "float32", ":int8": "8-bit"}
SYSTEMS = {
    "mor3": "MoR, 3 recursions",
    "vanilla": "our vanilla model, same engine",
    "openvino": "OpenVINO GenAI 2026.4.1",
}
COLORS = ("#0072B2", "#56B4E9", "#B0B4BC")


def read_runs() -> dict[tuple[str, str, str], dict[str, Any]]:
    """The recorded rows by commit, shape and system."""
    rows = [json.loads(line) for line in RESULTS.read_text("utf-8").splitlines()]
    return {
        (row["commit"][:7], row["shape"], row["system"]): row
        for row in rows
        if row["workload"] == "paper c32"
    }


def draw(runs: dict[tuple[str, str, str], dict[str, Any]]) -> None:
    """A panel per processor, shape and width of the weights; tokens per second of each system."""
    figure, axes = plt.subplots(1, 6, figsize=(11, 3.2), width_ratios=(4, 3, 3, 3, 3, 2.4))
    for axis, (processor, shape, suffix, commit) in zip(axes, PANELS, strict=True):
        found = {s: row for s in SYSTEMS if (row := runs.get((commit, shape, s + suffix)))}
        highest = 0.0
        for place, (system, row) in enumerate(found.items()):
            speed = row["tokens_per_s"]
            low, high = (row.get("tokens_per_s" + end, speed) for end in ("_low", "_high"))
            highest = max(highest, high)
            color = COLORS[list(SYSTEMS).index(system)]
            axis.bar(place, speed, 0.72, color=color, label=SYSTEMS[system])
            axis.vlines(place, low, high, color="#1d2330", linewidth=1)
            axis.annotate(
                f"{speed:,.0f}", (place, high), (0, 3), textcoords="offset points", ha="center",
                fontsize=8,
            )  # fmt: skip
        axis.set_title(f"{processor}\n{shape.upper()}, {WEIGHTS[suffix]}", fontsize=9)
        axis.set_xticks([])
        axis.set_ylim(0, 1.14 * highest)
        axis.tick_params(axis="y", labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("new tokens per second")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="lower center", ncols=4, frameon=False)
    figure.tight_layout(rect=(0, 0.1, 1, 1))
    figure.savefig(IMAGE, dpi=150)


if __name__ == "__main__":
    draw(read_runs())
    print(IMAGE.relative_to(ROOT))
