"""The curves of the uptraining evidence as an image, and its tables as Markdown.

    python benchmarks/uptrain/plot.py                # docs/images/uptrain.png, tables on the screen

Reads ``benchmarks/results/uptrain.jsonl`` (:mod:`evidence`).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "uptrain.jsonl"
IMAGE = ROOT / "docs" / "images" / "uptrain.png"
LONG = {
    "window": "R = 2, a block of 6 fills a gap",
    "window-mor": "then MoR",
    "window-dropped": "the same 16 layers, no recursion",
    "recursive": "R = 2, a block of 14 for the whole middle",
    "mor": "then MoR",
    "window-scratch": "MoR from scratch",
}
AFTER = {"mor": "recursive", "window-mor": "window"}
FOLD = "r2-stepwise"
"""Whose start is what folding loses: R = 2 from evenly spaced layers, nothing trained."""
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
    for name, label in LONG.items():
        rows = curves.get(name, [])
        first = (curves.get(AFTER.get(name, ""), []) or [None])[-1]
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
    axes[0].plot([], [], "x", color="grey", label="starts, 6,144 tokens each: R = 2 (x) and 3 (+)")
    axes[0].plot([], [], "--", color="black", lw=0.8, label="source model")
    axes[0].set_xlabel("thousand tokens trained on")
    axes[1].set_xlabel("processor seconds (one core)")
    axes[0].set_ylabel("NLL of the Brown text, sequences of 128")
    axes[0].legend(fontsize=7)
    figure.tight_layout()
    IMAGE.parent.mkdir(exist_ok=True)
    figure.savefig(IMAGE, dpi=90)


def line(name: str, row: dict[str, Any], source: float, folded: float) -> str:
    """One run as a row of the table."""
    share = f"{(folded - row['nll_512']) / (folded - source):.1%}"
    if row["group"] == "calibrated":
        depth = f"{row['nll_512_depth']:.2f}"
        return (
            f"| {name} (mean depth {depth}) | | | | | {row['nll']:.3f} | {row['nll_512']:.3f} "
            f"| {share} |"
        )
    began = row.get("start_nll_512")
    seconds = row.get("cpu_s", row["elapsed_s"])
    return (
        f"| {name} | {row['parameters'] / 1e6:.1f}M | {row['tokens']:,} | {seconds:,.0f} "
        f"| {'' if began is None else format(began, '.2f')} | {row['nll']:.3f} "
        f"| {row['nll_512']:.3f} | {'' if began is None else share} |"
    )


def tables(curves: dict[str, Any], finals: dict[str, Any]) -> None:
    """Every finished run, by group."""
    source, folded = finals["source"]["nll_512"], finals[FOLD]["start_nll_512"]
    groups: dict[str, list[str]] = {}
    for name, row in finals.items():
        if name != "source":
            groups.setdefault(row["group"], []).append(line(name, row, source, folded))
    for group, rows in groups.items():
        print(f"\n{group} (source: {finals['source']['nll']:.3f} and {source:.3f})\n")
        print(
            "| run | weights | tokens | CPU s | NLL at the start | NLL 128 | NLL 512 | recovered |"
        )
        print("|---|---|---|---|---|---|---|---|")
        print("\n".join(rows))
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
