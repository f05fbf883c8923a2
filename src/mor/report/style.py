"""How every plot looks: size, colours on light and dark, one colour per run."""

from __future__ import annotations

import io
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from mor.errors import missing_package

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Inches. Narrow enough that 11-point text can still be read when a phone shows it 370 px wide.
WIDTH, HEIGHT, DPI = 6.4, 4.3, 160
# Level or even lines differ in dash too, so that one on top of another can still be seen.
_DASHES: tuple[Any, ...] = ("-", (0, (5, 1.5)), (0, (1.5, 1.2)), (0, (6, 1.5, 1.5, 1.5)))
_MARKERS = "osD^vPX"
_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


@dataclass(frozen=True)
class Theme:
    """The colours of a plot. ``runs`` is Okabe and Ito's colour-blind-safe set, in its order."""

    dark: bool
    background: str
    ink: str
    faint: str
    grid: str
    runs: tuple[str, ...]

    def color(self, index: int) -> str:
        """Return the colour of run number ``index``, the same in every plot."""
        return self.runs[index % len(self.runs)]

    def marker(self, index: int) -> str:
        """Return the marker of run number ``index``."""
        return _MARKERS[index % len(_MARKERS)]

    def dash(self, index: int) -> Any:
        """Return the line style of run number ``index``."""
        turn, place = divmod(index, len(self.runs))
        return _DASHES[(place + turn) % len(_DASHES)]

    def noisy_dash(self, index: int) -> Any:
        """Return the line style for a ragged curve: whole, until the colours begin again."""
        return "-" if index < len(self.runs) else self.dash(index)


LIGHT = Theme(
    dark=False,
    background="#ffffff",
    ink="#1d2330",
    faint="#5c6575",
    grid="#e3e6ec",
    runs=("#0072b2", "#d55e00", "#009e73", "#b0428f", "#c98a00", "#3aa0dc", "#6b6b6b"),
)
DARK = Theme(
    dark=True,
    background="#171a21",
    ink="#e8eaf0",
    faint="#a3abba",
    grid="#2d323d",
    runs=("#4aa8e8", "#ff8f50", "#2fc79a", "#e58cc6", "#f2c14e", "#9bd3f5", "#a8a8a8"),
)


def require_matplotlib() -> None:
    """Raise MorError, saying what to install, where matplotlib (or Pillow, its own) is absent."""
    for module, package in (("matplotlib", "matplotlib"), ("PIL", "pillow")):
        try:
            import_module(module)
        except ImportError:
            raise missing_package("plots need", package, "report") from None


@contextmanager
def styled(theme: Theme) -> Iterator[None]:
    """Draw inside this context: the theme's colours, and no change to the user's own settings."""
    require_matplotlib()
    import matplotlib

    settings: Any = {
        "figure.facecolor": theme.background,
        "axes.facecolor": theme.background,
        "savefig.facecolor": theme.background,
        "text.color": theme.ink,
        "axes.labelcolor": theme.ink,
        "axes.edgecolor": theme.faint,
        "axes.titlesize": 12,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "axes.labelsize": 11,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": theme.grid,
        "xtick.color": theme.faint,
        "ytick.color": theme.faint,
        "xtick.labelcolor": theme.ink,
        "ytick.labelcolor": theme.ink,
        "font.size": 10.5,
        "font.family": ["DejaVu Sans"],
        "legend.frameon": False,
        "lines.linewidth": 2.0,
        # A run may be called "a$b": names are never formulas.
        "text.parse_math": False,
    }
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(settings)
        yield


def new_figure(rows: int = 1, columns: int = 1, height: float = HEIGHT, **grid: Any) -> Any:
    """Return (figure, flat list of axes), drawn by Agg without any window."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, height), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False, **grid)
    return figure, list(axes.flat)


def to_png(figure: Figure) -> bytes:
    """Return the figure as PNG; equal data give equal bytes."""
    from PIL import Image

    raw, out = io.BytesIO(), io.BytesIO()
    figure.savefig(raw, format="png")
    # A palette of 192 colours looks the same here and takes a third of the bytes.
    image = Image.open(raw).convert("RGB").quantize(192, dither=Image.Dither.NONE)
    image.save(out, format="png", optimize=True)
    return out.getvalue()


def run_legend(figure: Figure, handles: list[Any], labels: list[str]) -> None:
    """Put the names of the runs above the plot, where they cover no data."""
    names = [short(label) for label in labels]
    fit = max(1, 76 // (max(map(len, names)) + 8))
    rows = -(-len(names) // fit)
    columns = -(-len(names) // rows)
    figure.set_figheight(figure.get_figheight() + 0.22 * (rows - 1))
    figure.legend(handles, names, loc="outside upper left", ncols=columns, handlelength=2.4)


def short(label: str, room: int = 30) -> str:
    """Return a name of at most ``room`` characters; both ends stay, since runs differ in either.

    A leading underscore, which would hide it from the legend, gets a space before it.
    """
    label = " ".join(label.split())
    label = " " + label if label.startswith("_") else label
    tail = room // 3
    return label if len(label) <= room else label[: room - tail - 1] + "…" + label[-tail:]


def power_of_ten(largest: float) -> tuple[float, str]:
    """Return the unit to divide an axis by, and what to add to its label: (1e12, " (in 10¹²)")."""
    power = 3 * math.floor(math.log10(largest) / 3) if largest > 0 else 0
    return 10.0**power, f" (in 10{str(power).translate(_SUPERSCRIPT)})" if power else ""


def smooth(values: list[float]) -> list[float]:
    """Return the running mean of ``values``, centred, over about a twentieth of them."""
    half = len(values) // 40
    sums = [0.0, *accumulate(values)]
    windows = [
        (max(0, middle - half), min(len(values), middle + half + 1))
        for middle in range(len(values))
    ]
    return [(sums[end] - sums[start]) / (end - start) for start, end in windows]


def draw_line(
    axes: Axes, xs: list[float], ys: list[float], color: Any, linestyle: Any = "-"
) -> list[float]:
    """Draw a series faintly and its running mean over it; return the mean.

    A series of one point has no line: it gets a dot.
    """
    mean = smooth(ys)
    axes.plot(xs, ys, color=color, linewidth=0.8, alpha=0.3)
    dot = "." if len(xs) == 1 else ""
    axes.plot(xs, mean, color=color, linestyle=linestyle, marker=dot, markersize=9)
    return mean


def legend_line(
    theme: Theme, index: int, marker: bool = False, hollow: bool = False, noisy: bool = False
) -> Any:
    """Return a handle for the legend: the line of run number ``index``, with its marker."""
    from matplotlib.lines import Line2D

    color = theme.color(index)
    return Line2D(
        [],
        [],
        color=color,
        linestyle=theme.noisy_dash(index) if noisy else theme.dash(index),
        marker=theme.marker(index) if marker else "",
        markerfacecolor=theme.background if hollow else color,
        markeredgecolor=color,
    )


def percent_axis(axis: Any) -> None:
    """Print the ticks of ``axis``, fractions of 1, in per cent."""
    axis.set_major_formatter(lambda value, _: f"{100 * value:z.4g}%")
