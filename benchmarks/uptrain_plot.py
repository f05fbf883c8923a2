"""The curves of the uptraining evidence as an image, and its tables as Markdown.

    python benchmarks/uptrain_plot.py                # docs/images/uptrain.png, tables on the screen

Reads ``benchmarks/results/uptrain.jsonl`` (:mod:`uptrain_evidence`).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "uptrain.jsonl"
IMAGE = ROOT / "docs" / "images" / "uptrain.png"
LONG = {
    "recursive": "recursive R = 2, distilled",
    "mor": "MoR R = 2 (after recursive)",
    "scratch": "MoR from scratch",
}
PAPER = {"upper": 2.6605, "random": 2.6730, "stepwise": 2.6800, "average": 2.7314, "lower": 2.7449}
"""NLL after 5 billion tokens, R = 2 middle_cycle (arXiv 2507.10524)."""


def read() -> tuple[dict[str, list[dict[str, Any]]], dict[str, dict[str, Any]]]:
    """Curves and last lines by the name of a run."""
    curves: dict[str, list[dict[str, Any]]] = {}
    finals = {}
    for line in RESULTS.read_text("utf-8").splitlines():
        row = json.loads(line)
        if row["kind"] == "curve":
            curves.setdefault(row["run"], []).append(row)
        else:
            finals[row["run"]] = row
    return curves, finals


def draw(curves: dict[str, Any], finals: dict[str, Any]) -> None:
    """NLL against tokens and against processor seconds."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.8), sharey=True)
    before = {"mor": "recursive"}
    for name, label in LONG.items():
        rows = curves.get(name, [])
        first = (curves.get(before.get(name, ""), []) or [None])[-1]
        for axis, key, scale in zip(axes, ("tokens", "cpu_s"), (1e3, 1.0), strict=True):
            shift = 0.0 if first is None else first[key]
            points = [(shift + row[key], row["nll"]) for row in rows if key in row]
            if first is not None:
                points.insert(0, (shift, first["nll"]))
            if points:
                axis.plot(
                    *zip(*[(x / scale, y) for x, y in points], strict=True), "o-", ms=3, label=label
                )
    for name, rows in curves.items():
        if name in LONG or rows[0]["group"] != "start":
            continue
        last = rows[-1]
        mark = "x" if name.startswith("r2") else "+"
        axes[0].plot(last["tokens"] / 1e3, last["nll"], mark, color="grey", ms=5)
        axes[1].plot(last["cpu_s"], last["nll"], mark, color="grey", ms=5)
    for axis in axes:
        axis.axhline(finals["source"]["nll"], color="black", lw=0.8, ls="--")
        axis.grid(alpha=0.3)
    axes[0].plot([], [], "x", color="grey", label="other starts, R = 2 (x) and 3 (+)")
    axes[0].plot([], [], "--", color="black", lw=0.8, label="source model")
    axes[0].set_xlabel("thousand tokens trained on")
    axes[1].set_xlabel("processor seconds (one core)")
    axes[0].set_ylabel("NLL of the Brown text, sequences of 128")
    axes[0].legend(fontsize=7)
    figure.tight_layout()
    IMAGE.parent.mkdir(exist_ok=True)
    figure.savefig(IMAGE, dpi=90)


def recovered(row: dict[str, Any], source: float) -> str:
    """Share of what folding lost that came back."""
    lost = row["start_nll_512"] - source
    return f"{(row['start_nll_512'] - row['nll_512']) / lost:.1%}"


def tables(curves: dict[str, Any], finals: dict[str, Any]) -> None:
    """Every finished run."""
    source = finals["source"]["nll_512"]
    print(
        "| run | parameters | tokens | CPU s | NLL at the start | NLL, 128 | NLL, 512 | recovered |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for name, row in finals.items():
        if name == "source":
            print(f"| source | 134.5M | | | | {row['nll']:.3f} | {row['nll_512']:.3f} | |")
            continue
        if row["group"] == "calibrated":
            depth = f"mean depth {row['nll_512_depth']:.2f}"
            print(f"| {name} | | | | {depth} | {row['nll']:.3f} | {row['nll_512']:.3f} | |")
            continue
        started = row.get("start_nll_512")
        if name == "mor":
            started = finals["recursive"]["start_nll_512"]  # of the fold, two stages ago
            row = row | {"start_nll_512": started}
        share = "" if started is None else recovered(row, source)
        began = "" if started is None else f"{started:.2f}"
        seconds, size = row.get("cpu_s", row["elapsed_s"]), row["parameters"] / 1e6
        print(
            f"| {name} | {size:.1f}M | {row['tokens']:,} | {seconds:.0f} "
            f"| {began} | {row['nll']:.3f} | {row['nll_512']:.3f} | {share} |"
        )
    order = sorted(
        (row["nll_512"], name) for name, row in finals.items() if row["group"] == "start"
    )
    print("\norder of starts:", ", ".join(f"{name} {nll:.3f}" for nll, name in order))
    print("the paper's, R = 2:", ", ".join(sorted(PAPER, key=lambda name: PAPER[name])))
    for name in LONG:
        print(name, [(row["tokens"], round(row["nll"], 3)) for row in curves.get(name, [])])


def main() -> None:
    """Draw and print."""
    curves, finals = read()
    draw(curves, finals)
    tables(curves, finals)


if __name__ == "__main__":
    main()
