"""The plots of the router: who is active, how deep tokens go, where the boundary lies."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from mor.report.colors import depth_line_colors
from mor.report.records import Run
from mor.report.style import (
    Theme,
    draw_line,
    legend_line,
    new_figure,
    percent_axis,
    power_of_ten,
    run_legend,
    short,
    to_png,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Indexed = list[tuple[int, Run]]


def active_fraction(runs: Sequence[Run], theme: Theme) -> bytes | None:
    """Fraction of tokens active at each depth over training, one panel per run."""
    key = "router/active_fraction"
    routed = _routed(runs, key)
    if not routed:
        return None
    columns = 1 if len(routed) == 1 else 2
    rows = -(-len(routed) // columns)
    figure, panels = new_figure(
        rows, columns, height=max(4.0, 0.9 + 2.5 * rows), sharex=True, sharey=True
    )
    scale, power = _token_scale(routed)
    for axes, (index, run) in zip(panels, routed, strict=False):
        colors = depth_line_colors(run.summary.num_recursions, theme.dark)
        for depth in run.depths_of(key):
            xs, ys = run.series(f"{key}/{depth}")
            color = colors[min(depth, len(colors) - 1)]
            mean = draw_line(axes, [x / scale for x in xs], ys, color)
            if mean:
                _name_line(axes, f"depth {depth}", mean[-1], color)
        for capacity in run.summary.capacities or []:
            axes.axhline(capacity, color=theme.faint, linestyle=(0, (4, 3)), linewidth=1.1)
        axes.set_title(short(run.label, 30 if columns == 1 else 22), color=theme.color(index))
        axes.set_ylim(0, 1.06)
        axes.margins(x=0.01)
        percent_axis(axes.yaxis)
    for spare in panels[len(routed) :]:
        spare.set_visible(False)
    for lowest in panels[: len(routed)][-columns:]:
        lowest.tick_params(labelbottom=True)
    figure.supxlabel("tokens seen" + power, fontsize=11)
    figure.supylabel("tokens active", fontsize=11)
    return to_png(figure)


def depth_histogram(runs: Sequence[Run], theme: Theme) -> bytes | None:
    """Share of the sample's tokens by recursions taken, the runs side by side."""
    shown = [
        (index, run, run.eval.sample.depths)
        for index, run in enumerate(runs)
        if run.summary.num_recursions > 1 and run.eval and run.eval.sample
    ]
    shown = [item for item in shown if item[2]]
    if not shown:
        return None
    figure, (axes,) = new_figure()
    width = 0.82 / len(shown)
    bars = []
    for place, (index, _, depths) in enumerate(shown):
        counts = Counter(depths)
        xs = sorted(counts)
        shares = [counts[depth] / len(depths) for depth in xs]
        middle = [depth + (place - (len(shown) - 1) / 2) * width for depth in xs]
        bar = axes.bar(middle, shares, width * 0.92, color=theme.color(index))
        if len(shown) <= 4:  # more bars are too narrow for their numbers
            axes.bar_label(bar, [f"{share:z.0%}" for share in shares], fontsize=9, padding=2)
        bars.append(bar)
    deepest = max(run.summary.num_recursions for _, run, _ in shown)
    lowest = min(min(depths) for _, _, depths in shown)
    axes.set_xticks(range(min(1, lowest), deepest + 1))
    axes.set_xlim(min(1, lowest) - 0.5, deepest + 0.5)
    axes.grid(False, axis="x")
    axes.margins(y=0.12)
    axes.set_xlabel("recursions taken")
    axes.set_ylabel("share of the passage's tokens")
    percent_axis(axes.yaxis)
    run_legend(figure, bars, [run.label for _, run, _ in shown])
    return to_png(figure)


def boundary(runs: Sequence[Run], theme: Theme) -> bytes | None:
    """The router's boundary (in units of its score) over training, one panel per depth."""
    return _by_depth(runs, theme, "router/boundary", "boundary (router score)", percent=False)


def accuracy(runs: Sequence[Run], theme: Theme) -> bytes | None:
    """Agreement of the causal rule with the training selection, one panel per depth."""
    return _by_depth(runs, theme, "router/accuracy", "tokens decided alike", percent=True)


def _by_depth(
    runs: Sequence[Run], theme: Theme, key: str, label: str, percent: bool
) -> bytes | None:
    routed = _routed(runs, key)
    depths = sorted(
        {depth for _, run in routed for depth in run.depths_of(key) if _decides(run, depth)}
    )
    if not depths:
        return None
    height = max(4.0, 1.2 + 2.2 * len(depths))
    figure, panels = new_figure(len(depths), 1, height=height, sharex=True)
    scale, power = _token_scale(routed)
    for axes, depth in zip(panels, depths, strict=True):
        for index, run in routed:
            xs, ys = run.series(f"{key}/{depth}")
            xs = [x / scale for x in xs]
            color = theme.color(index)
            draw_line(axes, xs, ys, color, theme.dash(index))
            final = _final_accuracy(run, depth) if percent and xs else None
            if final is not None:
                ring = {"markerfacecolor": theme.background, "markeredgewidth": 1.8}
                axes.plot([xs[-1]], [final], "o", color=color, markersize=7, clip_on=False, **ring)
        axes.set_title(f"depth {depth}")
        axes.margins(x=0.02)
        if percent:
            percent_axis(axes.yaxis)
    panels[-1].set_xlabel("tokens seen" + power)
    figure.supylabel(label, fontsize=11)
    handles = [legend_line(theme, index) for index, _ in routed]
    run_legend(figure, handles, [run.label for _, run in routed])
    return to_png(figure)


def _routed(runs: Sequence[Run], key: str) -> Indexed:
    """The runs, with their numbers, whose router picks tokens and has ``key`` in the log."""
    return [(index, run) for index, run in enumerate(runs) if run.routed and run.depths_of(key)]


def _decides(run: Run, depth: int) -> bool:
    """Whether there is anything to decide at ``depth``: not where every token is let through."""
    _, shares = run.series(f"router/active_fraction/{depth}")
    return not shares or min(shares) < 1


def _final_accuracy(run: Run, depth: int) -> float | None:
    """The evaluation's accuracy at ``depth``; its list covers the last depths of the run."""
    found = run.eval.router.accuracy if run.eval and run.eval.router else []
    place = depth - (run.summary.num_recursions - len(found))
    return found[place] if 0 <= place < len(found) else None


def _token_scale(routed: Indexed) -> tuple[float, str]:
    return power_of_ten(max((row.get("tokens", 0) for _, run in routed for row in run.log)))


def _name_line(axes: Axes, text: str, y: float, color: Any) -> None:
    """Write the name of a line beside its end, right of the panel."""
    axes.annotate(
        text,
        (1, y),
        xycoords=("axes fraction", "data"),
        xytext=(3, 0),
        textcoords="offset points",
        va="center",
        color=color,
        fontsize=9.5,
        fontweight="bold",
    )
