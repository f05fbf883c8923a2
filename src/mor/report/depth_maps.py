"""Pictures of depth: patches of an image, frames of a sound, coloured by their recursions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from mor.report.colors import depth_colors
from mor.report.records import Run
from mor.report.shown import Shown
from mor.report.style import Theme, new_figure, short, to_png

_IMAGES, _SOUNDS, _COLUMNS = 12, 6, 4


def image_depth(runs: Sequence[Run], theme: Theme) -> bytes | None:
    """Images of the first routed run that has some, each beside its depth."""
    found = _first(runs, "images")
    if found is None:
        return None
    run, shown = found
    shown = shown[:_IMAGES]
    columns = min(_COLUMNS, len(shown))
    rows = -(-len(shown) // columns)
    figure, panels = new_figure(rows, columns, height=0.9 + 1.15 * rows)
    for axes, one in zip(panels, shown, strict=False):
        pixels = _pixels(one)
        shades = _overlay(pixels, one, run.summary.num_recursions, theme)
        gap = np.full((pixels.shape[0], max(1, pixels.shape[1] // 12), 3), _rgb(theme.background))
        axes.imshow(np.concatenate([pixels, gap, shades], 1), interpolation="nearest")
        _title(axes, one)
    _finish(figure, panels, len(shown), run, theme)
    return to_png(figure)


def sound_depth(runs: Sequence[Run], theme: Theme) -> bytes | None:
    """Sounds of the first routed run that has some, each above its depth."""
    found = _first(runs, "audio")
    if found is None:
        return None
    run, shown = found
    shown = _spread(shown, _SOUNDS)
    columns = min(2, len(shown))
    rows = -(-len(shown) // columns)
    figure, panels = new_figure(rows, columns, height=0.9 + 1.5 * rows)
    colors = np.array(
        [_rgb(c.background) for c in depth_colors(run.summary.num_recursions, theme.dark)]
    )
    for axes, one in zip(panels, shown, strict=False):
        frames = np.frombuffer(one.values, np.uint8).reshape(one.shape)
        length, bins = frames.shape
        axes.imshow(
            frames.T,
            origin="lower",
            aspect="auto",
            cmap="magma",
            interpolation="nearest",
            extent=(0, length, 0, bins),
        )
        strip = colors[_depths(one, run)]
        wide = np.repeat(strip, one.frames_per_token, 1)[:, :length]
        axes.imshow(
            wide,
            origin="lower",
            aspect="auto",
            interpolation="nearest",
            extent=(0, length, -0.35 * bins, -0.08 * bins),
        )
        axes.set_ylim(-0.35 * bins, bins)
        _title(axes, one)
    _finish(figure, panels, len(shown), run, theme)
    return to_png(figure)


def _first(runs: Sequence[Run], kind: str) -> tuple[Run, list[Shown]] | None:
    for run in runs:
        if run.routed and run.eval is not None and run.eval.kind == kind and run.eval.shown:
            return run, run.eval.shown
    return None


def _spread(shown: list[Shown], count: int) -> list[Shown]:
    places = np.linspace(0, len(shown) - 1, min(count, len(shown))).round().astype(int)
    return [shown[place] for place in places]


def _depths(one: Shown, run: Run) -> np.ndarray:
    return np.minimum(np.array(one.depths), run.summary.num_recursions)


def _pixels(one: Shown) -> np.ndarray:
    """RGB in [0, 1], [H, W, 3]."""
    values = np.frombuffer(one.values, np.uint8).reshape(one.shape) / 255
    return np.repeat(values, 3, -1) if values.shape[-1] == 1 else values


def _overlay(pixels: np.ndarray, one: Shown, recursions: int, theme: Theme) -> np.ndarray:
    """The image under the colours of its patches, so that both can be made out."""
    colors = np.array([_rgb(color.background) for color in depth_colors(recursions, theme.dark)])
    patches = colors[np.minimum(np.array(one.depths), recursions)]
    height, width = (pixels.shape[side] // patches.shape[side] for side in (0, 1))
    shades = patches.repeat(height, 0).repeat(width, 1)
    grey = pixels.mean(-1, keepdims=True)
    return np.clip(0.7 * shades + 0.3 * grey, 0, 1)


def _title(axes: Any, one: Shown) -> None:
    words = one.truth if one.answer == one.truth else f"{one.truth}, not {one.answer}"
    axes.set_title(f"{short(words, 20)}  {one.mean_depth:z.2f}", fontsize=8.5, fontweight="normal")
    axes.set_axis_off()


def _finish(figure: Any, panels: list[Any], used: int, run: Run, theme: Theme) -> None:
    from matplotlib.patches import Patch

    for spare in panels[used:]:
        spare.set_visible(False)
    colors = depth_colors(run.summary.num_recursions, theme.dark)
    handles = [
        Patch(facecolor=color.background, edgecolor=theme.faint, label=f"{depth}")
        for depth, color in enumerate(colors)
    ]
    title = f"{short(run.label)}: recursions"
    figure.legend(handles=handles, title=title, loc="outside upper left", ncols=len(handles))


def _rgb(color: str) -> tuple[float, float, float]:
    red, green, blue = (int(color[start : start + 2], 16) / 255 for start in (1, 3, 5))
    return red, green, blue
