"""The plots of a study: NLL by row with every seed, and NLL against size at each budget."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from mor.report.style import LIGHT, new_figure, run_legend, styled, to_png
from mor.study.tables import best_records, short_count, whole_budgets

Record = dict[str, Any]

_MARKS = [digit * 10.0**power for power in range(2, 13) for digit in (1, 3)]


def draw_study(records: Sequence[Record]) -> dict[str, bytes]:
    """PNG by file stem. Raises `MorError` where matplotlib is not installed."""
    plots = {"rows": draw_rows(records)}
    curves = draw_curves(records)
    return plots if curves is None else plots | {"isoflop": curves}


def draw_rows(records: Sequence[Record]) -> bytes:
    """A line for each row of the whole budget: its seeds as dots, their mean as a bar."""
    groups = best_records(records)
    rows = {row: groups[row, budget] for row, budget in whole_budgets(groups).items()}
    with styled(LIGHT):
        figure, (axes,) = new_figure()
        for place, group in enumerate(rows.values()):
            values = [record["causal"]["nll"] for record in group]
            colour = LIGHT.color(place)
            axes.plot(values, [place] * len(values), "o", color=colour)
            axes.plot([float(np.mean(values))] * 2, [place - 0.3, place + 0.3], color=colour)
        axes.set_yticks(range(len(rows)), list(rows))
        axes.invert_yaxis()
        axes.set_xlabel("causal NLL (nats/token)")
        axes.set_title("Every seed, and the mean")
        return to_png(figure)


def draw_curves(records: Sequence[Record]) -> bytes | None:
    """NLL against parameters, a panel for each budget, a curve for each family.

    None with one size.
    """
    curves = isoflop_curves(records)
    if not curves:
        return None
    families = list(dict.fromkeys(family for family, _ in curves))
    budgets = sorted({budget for _, budget in curves})
    sizes = [size for sizes, _ in curves.values() for size in sizes]
    marks = [mark for mark in _MARKS if 0.8 * min(sizes) <= mark <= 1.25 * max(sizes)]
    with styled(LIGHT):
        figure, panels = new_figure(1, len(budgets))
        lines: dict[str, Any] = {}
        for axes, budget in zip(panels, budgets, strict=True):
            for place, family in enumerate(families):
                if (family, budget) not in curves:
                    continue
                own_sizes, values = curves[family, budget]
                style = {"color": LIGHT.color(place), "marker": LIGHT.marker(place)}
                (lines[family],) = axes.plot(own_sizes, values, **style)
                optimum = fit_optimum(own_sizes, values)
                if optimum is not None:
                    axes.plot(*optimum, "*", color=LIGHT.color(place), markersize=13)
            axes.set_xscale("log")
            axes.set_xlim(0.75 * min(sizes), 1.35 * max(sizes))
            axes.set_xticks(marks, [short_count(mark) for mark in marks])
            axes.set_xticks([], minor=True)
            axes.set_title(f"{_flops_of(records, budget):.2e} FLOPs".replace("e+", "e"))
        panels[0].set_ylabel("causal NLL (nats/token)")
        figure.supxlabel("parameters without embedding; a star is a fitted optimum", fontsize=11)
        run_legend(figure, list(lines.values()), list(lines))
        return to_png(figure)


def _flops_of(records: Sequence[Record], budget: int) -> float:
    """Median training FLOPs at a budget."""
    own = [record["summary"]["train_flops"] for record in records if record["budget"] == budget]
    return float(np.median(own))


def isoflop_curves(
    records: Sequence[Record],
) -> dict[tuple[str, int], tuple[list[float], list[float]]]:
    """Sizes and mean NLL of each (family, budget) that has at least two sizes."""
    found: dict[tuple[str, int], dict[float, list[float]]] = {}
    for (_, budget), group in best_records(records).items():
        for record in group:
            size = record["summary"]["non_embedding_parameters"]
            curve = found.setdefault((record["family"], budget), {})
            curve.setdefault(size, []).append(record["causal"]["nll"])
    return {
        key: (sorted(curve), [float(np.mean(curve[size])) for size in sorted(curve)])
        for key, curve in found.items()
        if len(curve) > 1
    }


def fit_optimum(sizes: Sequence[float], values: Sequence[float]) -> tuple[float, float] | None:
    """Size and NLL at the bottom of a parabola in log(size); None where it has none inside.

    With fewer than three sizes there is no parabola; one that opens downwards, or whose bottom lies
    outside the sizes trained, says nothing of an optimum.
    """
    if len(sizes) < 3:
        return None
    logs = np.log(np.array(sizes))
    curve, slope, level = np.polyfit(logs - logs.mean(), np.array(values), 2)
    if curve <= 0:
        return None
    bottom = -slope / (2 * curve)
    if not logs.min() <= bottom + logs.mean() <= logs.max():
        return None
    return float(np.exp(bottom + logs.mean())), float(level - slope**2 / (4 * curve))
