"""The plots of a report: loss against cost, and NLL against depth.

Each function takes the runs and a theme and returns a PNG, or None where no run has the numbers.
:func:`draw_plots` draws all of them, the router's too, once for light pages and once for dark.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mor.report import depth_maps, router_plots
from mor.report.records import Run
from mor.report.style import (
    DARK,
    LIGHT,
    Theme,
    draw_line,
    legend_line,
    new_figure,
    power_of_ten,
    require_matplotlib,
    run_legend,
    smooth,
    styled,
    to_png,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Draw = Callable[[Sequence[Run], Theme], bytes | None]


@dataclass(frozen=True)
class Plot:
    """One finished plot: file stem, words for the page, and the PNG in both themes."""

    name: str
    title: str
    caption: str
    png: bytes
    png_dark: bytes


@dataclass(frozen=True)
class _Kind:
    name: str
    title: str
    caption: str
    draw: Draw


@dataclass(frozen=True)
class _Curve:
    """The loss of run number ``index``, its running mean, and its checks on validation text."""

    index: int
    xs: list[float]
    ys: list[float]
    mean: list[float]
    check_xs: list[float]
    check_ys: list[float]


def draw_plots(runs: Sequence[Run]) -> list[Plot]:
    """Draw every plot for which some run has the numbers.

    Raises:
        MorError: matplotlib is not installed.
    """
    require_matplotlib()
    plots = []
    for kind in _KINDS:
        with styled(LIGHT):
            png = kind.draw(runs, LIGHT)
        if png is None:
            continue
        with styled(DARK):
            png_dark = kind.draw(runs, DARK) or b""
        plots.append(Plot(kind.name, kind.title, kind.caption, png, png_dark))
    return plots


def loss_against_flops(runs: Sequence[Run], theme: Theme) -> bytes | None:
    """Training loss (nats per token) against training FLOPs."""
    return _loss(runs, theme, "flops", "training FLOPs")


def loss_against_tokens(runs: Sequence[Run], theme: Theme) -> bytes | None:
    """Training loss (nats per token) against tokens seen."""
    return _loss(runs, theme, "tokens", "tokens seen")


def nll_against_cap(runs: Sequence[Run], theme: Theme) -> bytes | None:
    """Causal NLL (nats per token) against the depth cap; runs of one depth as level lines."""
    scored = [(index, run, run.eval) for index, run in enumerate(runs) if run.eval]
    if all(len(result.depth_cap) < 2 for _, _, result in scored):
        return None
    figure, (axes,) = new_figure()
    handles = []
    for index, _, result in scored:
        color, dash = theme.color(index), theme.dash(index)
        caps = sorted(result.depth_cap, key=lambda cap: cap.max_depth)
        if len(caps) > 1:
            xs, ys = [cap.max_depth for cap in caps], [cap.nll for cap in caps]
            axes.plot(xs, ys, color=color, ls=dash, marker=theme.marker(index), markersize=7)
        else:
            axes.axhline(result.causal.nll, color=color, linestyle=dash)
        handles.append(legend_line(theme, index, marker=len(caps) > 1))
    deepest = max(cap.max_depth for _, _, result in scored for cap in result.depth_cap)
    axes.set_xticks(range(1, deepest + 1))
    axes.margins(x=0.08, y=0.12)
    axes.set_xlabel("depth cap (most recursions a token may take)")
    axes.set_ylabel("causal NLL (nats per token)")
    run_legend(figure, handles, [run.label for _, run, _ in scored])
    return to_png(figure)


def _loss(runs: Sequence[Run], theme: Theme, x: str, label: str) -> bytes | None:
    curves = _curves(runs, x)
    if not curves:
        return None
    longest = max(curve.xs[-1] for curve in curves)
    late = 2 / 3 * min(curve.xs[-1] for curve in curves)
    scale, power = power_of_ten(longest)
    figure, (whole, end) = new_figure(2, 1, height=6.2, height_ratios=[3, 2])
    for axes in (whole, end):
        for curve in curves:
            _draw_curve(axes, curve, theme, scale)
    # The fall of the first steps would press the rest of the curve flat.
    _fit(whole, curves, 0.05 * longest, longest, scale)
    _fit(end, curves, late, longest, scale)
    whole.set_xlim(left=0)
    whole.set_title("the whole run")
    end.set_title("the last third, closer")
    end.set_xlabel(label + power)
    figure.supylabel("training loss (nats per token)", fontsize=11)
    handles = [
        legend_line(theme, curve.index, bool(curve.check_xs), hollow=True, noisy=True)
        for curve in curves
    ]
    run_legend(figure, handles, [runs[curve.index].label for curve in curves])
    return to_png(figure)


def _curves(runs: Sequence[Run], x: str) -> list[_Curve]:
    curves = []
    for index, run in enumerate(runs):
        # Each router adds losses of its own; the language-modelling part alone compares.
        xs, ys = run.series("lm_loss", x)
        if not xs:
            xs, ys = run.series("loss", x)
        if xs and xs[-1] > 0:
            curves.append(_Curve(index, xs, ys, smooth(ys), *run.series("eval_nll", x)))
    return curves


def _draw_curve(axes: Axes, curve: _Curve, theme: Theme, scale: float) -> None:
    color = theme.color(curve.index)
    xs = [value / scale for value in curve.xs]
    draw_line(axes, xs, curve.ys, color, theme.noisy_dash(curve.index))
    axes.plot(
        [value / scale for value in curve.check_xs],
        curve.check_ys,
        linestyle="none",
        marker=theme.marker(curve.index),
        markersize=6,
        markerfacecolor=theme.background,
        markeredgecolor=color,
        markeredgewidth=1.5,
    )


def _fit(axes: Axes, curves: list[_Curve], low: float, high: float, scale: float) -> None:
    """Fit both axes to the smoothed curves and the checks between ``low`` and ``high``."""
    inside = [
        y
        for curve in curves
        for xs, ys in ((curve.xs, curve.mean), (curve.check_xs, curve.check_ys))
        for x, y in zip(xs, ys, strict=True)
        if low <= x <= high
    ]
    if inside:
        pad = 0.06 * (max(inside) - min(inside)) or 0.05
        axes.set_ylim(min(inside) - pad, max(inside) + pad)
    # A little room at the right, so that the last check is drawn whole.
    axes.set_xlim(low / scale, (high + 0.015 * (high - low)) / scale)


_KINDS = (
    _Kind(
        "loss_vs_flops",
        "Loss against compute",
        "Training loss, language-modelling part, against training FLOPs; thick lines are running "
        "means. Hollow marks, where there are any, are the causal NLL on validation text. A router "
        "that picks tokens by looking ahead trains with a loss that flatters it: compare the NLLs "
        "of the table.",
        loss_against_flops,
    ),
    _Kind(
        "loss_vs_tokens",
        "Loss against tokens",
        "The same losses against the tokens seen. Routing makes a token cheaper, so at equal "
        "FLOPs a routed model sees more of them.",
        loss_against_tokens,
    ),
    _Kind(
        "nll_vs_depth_cap",
        "NLL by depth cap",
        "Causal NLL when no token may take more recursions than the cap. A level line is a model "
        "of one pass. A falling line means that depth is used; a flat one, that it is not.",
        nll_against_cap,
    ),
    _Kind(
        "depth_histogram",
        "How deep tokens go",
        "Share of the tokens of the sample passage by the recursions they took under the causal "
        "rule.",
        router_plots.depth_histogram,
    ),
    _Kind(
        "image_depth",
        "Which patches go deep",
        "Images of the held-out split, from the surest right answer to the surest wrong one. Each "
        "stands beside itself under the colour of its patches' recursions; its class is written "
        "above it, and the answer where that is another.",
        depth_maps.image_depth,
    ),
    _Kind(
        "sound_depth",
        "Which frames go deep",
        "Sounds of the held-out split, from the surest right answer to the surest wrong one: "
        "frames from left to right, low coefficients at the bottom, and beneath them the "
        "recursions of each token.",
        depth_maps.sound_depth,
    ),
    _Kind(
        "active_fraction",
        "Tokens active at each depth",
        "Share of tokens that enter each depth (0 is the first recursion) while training. Dashed "
        "lines are the target capacities, where the run names them.",
        router_plots.active_fraction,
    ),
    _Kind(
        "router_boundary",
        "The router's boundary",
        "The stored score that a token must pass to continue, by depth. Drift late in training "
        "means that the causal rule follows a moving target.",
        router_plots.boundary,
    ),
    _Kind(
        "router_accuracy",
        "Does the causal rule agree with training?",
        "Share of tokens for which the causal rule decides as the training selection did. Rings at "
        "the right are the evaluation's.",
        router_plots.accuracy,
    ),
)

PLOT_NAMES = tuple(kind.name for kind in _KINDS)
