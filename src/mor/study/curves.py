"""Test-time scaling and elastic capacity: NLL against the FLOPs that were executed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mor.eval.elastic import Point, elastic_range
from mor.report.style import LIGHT, new_figure, run_legend, short, styled, to_png
from mor.study.pages import Pages, write_pages
from mor.study.tables import Table

TOLERANCE = 0.01
Curves = Mapping[str, Sequence[Point]]

_NOTE = (
    "FLOPs are those of a forward pass, per token, as the tokens were routed. A cap on depth stops "
    "every token there; a capacity moves the boundaries of the router, as a factor on the trained "
    "capacities. Models of one point were trained for it alone."
)


def curve_records(curves: Curves) -> list[dict[str, Any]]:
    """A JSON line for each point."""
    return [
        {"model": name, **point.record()} for name, points in curves.items() for point in points
    ]


def curve_table(curves: Curves) -> Table:
    """A line for each model and setting; the change is against the model's own full depth."""
    task = _is_task(curves)
    columns = ["model", "setting", "depth", "recursion FLOPs", "all FLOPs", "NLL", "change"]
    rows = []
    for name, points in curves.items():
        full = _full_depth(points)
        for point in points:
            word = "at most" if point.kind == "depth" else "capacity"
            rows.append(
                [
                    name,
                    f"{word} {point.value:g}",
                    f"{point.mean_depth:z.3f}",
                    f"{point.recursion_flops:.4g}",
                    f"{point.forward_flops:.4g}",
                    f"{point.nll:z.4f}",
                    f"{point.nll - full.nll:+z.4f}",
                    *([_percent(point)] if task else []),
                ]
            )
    return Table("Every setting", columns + (["exact match"] if task else []), rows, _NOTE)


def range_table(curves: Curves, tolerance: float = TOLERANCE) -> Table:
    """How far each model's recursion FLOPs can vary within `tolerance` of its best."""
    task, rows = _is_task(curves), []
    for name, points in curves.items():
        for kind, title in (("depth", "caps on depth"), ("capacity", "capacities")):
            mine = [point for point in points if point.kind == kind]
            if len(mine) > 1:
                scores = [float(p.exact_match or 0) if task else p.nll for p in mine]
                spread = max(scores) - min(scores)
                rows.append(
                    [
                        name,
                        title,
                        f"{elastic_range(mine, tolerance):z.2f}x",
                        f"{100 * spread:z.1f}%" if task else f"{spread:z.4f}",
                        f"{elastic_range(mine, float('inf')):z.2f}x",
                    ]
                )
    within = f"{100 * tolerance:g}% of the answers" if task else f"{tolerance:g} nats"
    columns = ["model", "set", f"range within {within}", "spread of all", "whole range"]
    note = "Ranges are of recursion FLOPs, around the best setting."
    return Table("How elastic a checkpoint is", columns, rows, note)


def draw_curves(curves: Curves) -> bytes:
    """One plot for all models: caps dashed, capacities whole, models of one depth as single marks.

    Tasks are shown by exact match, text by NLL.
    """
    task = _is_task(curves)
    with styled(LIGHT):
        figure, (axes,) = new_figure()
        handles, names = [], []
        for place, (name, points) in enumerate(curves.items()):
            for kind, line, word in (("depth", "--", "depth"), ("capacity", "-", "capacity")):
                mine = sorted(
                    (point for point in points if point.kind == kind),
                    key=lambda point: point.forward_flops,
                )
                if not mine:
                    continue
                values = [100 * float(p.exact_match or 0) if task else p.nll for p in mine]
                style = {"color": LIGHT.color(place), "marker": LIGHT.marker(place)}
                handles += axes.plot(
                    [point.forward_flops for point in mine], values, linestyle=line, **style
                )
                names.append(short(name, 24) + (f", {word}" if len(points) > 1 else ""))
        axes.set_xlabel("executed FLOPs per token, forward")
        axes.set_ylabel("exact match (%)" if task else "causal NLL (nats/token)")
        run_legend(figure, handles, names)
        return to_png(figure)


def write_curves(curves: Curves, out: Path, tolerance: float = TOLERANCE) -> Path:
    """Write `curves.jsonl`, `report.md`, `curves.png` and `index.html`; returns the page's path.

    Raises:
        MorError: matplotlib is not installed, or `out` cannot be written.
    """
    tables = [curve_table(curves), range_table(curves, tolerance)]
    title = "Test-time scaling and elastic capacity"
    pages = Pages(title, "", tables, {"curves": draw_curves(curves)})
    return write_pages(pages, curve_records(curves), out, "curves")


def _full_depth(points: Sequence[Point]) -> Point:
    return max((p for p in points if p.kind == "depth"), key=lambda point: point.value)


def _is_task(curves: Curves) -> bool:
    return all(point.exact_match is not None for points in curves.values() for point in points)


def _percent(point: Point) -> str:
    return "-" if point.exact_match is None else f"{100 * point.exact_match:.1f}%"
