"""How every plot looks: size, colours on light and dark, one colour per run."""

from __future__ import annotations

import io
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mor.errors import MorError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Inches. Narrow enough that 11-point text can still be read when a phone shows it 370 px wide.
WIDTH, HEIGHT, DPI = 6.4, 4.3, 160
# Lines differ in colour and in dash, so that a grey print still tells them apart.
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
        return _DASHES[(index + index // len(self.runs)) % len(_DASHES)]


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
    """Raise MorError, saying what to install, where matplotlib is absent."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise MorError(
            "plots need matplotlib, which is not installed: "
            "pip install mixture-of-recursions[report]"
        ) from None


@contextmanager
def styled(theme: Theme) -> Iterator[None]:
    """Draw inside this context: the theme's colours, and no change to the user's own settings."""
    require_matplotlib()
    import matplotlib

    settings: dict[str, Any] = {
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
    out = io.BytesIO()
    figure.savefig(out, format="png", metadata={"Software": None})
    return out.getvalue()


def run_legend(figure: Figure, handles: list[Any], labels: list[str]) -> None:
    """Put the names of the runs above the plot, where they cover no data."""
    names = [short(label) for label in labels]
    wide = max(map(len, names), default=0)
    columns = max(1, min(len(names), 72 // (wide + 8)))
    figure.legend(handles, names, loc="outside upper left", ncols=columns, handlelength=2.4)


def short(label: str) -> str:
    """Return a name that fits a plot. A leading underscore would hide it from the legend."""
    label = " ".join(label.split())
    label = label if len(label) <= 30 else label[:29] + "…"
    return " " + label if label.startswith("_") else label


def power_of_ten(largest: float) -> tuple[float, str]:
    """Return the unit to divide an axis by, and what to add to its label: (1e12, " (in 10¹²)")."""
    power = 3 * math.floor(math.log10(largest) / 3) if largest > 0 else 0
    return 10.0**power, f" (in 10{str(power).translate(_SUPERSCRIPT)})" if power else ""


def smooth(values: list[float], span: int) -> list[float]:
    """Return the running mean of ``values`` with exponential weights over about ``span`` points."""
    keep = 1 - 2 / (span + 1)
    mean, weight, out = 0.0, 0.0, []
    for value in values:
        mean, weight = keep * mean + (1 - keep) * value, keep * weight + (1 - keep)
        out.append(mean / weight)  # dividing by the weight so far frees the start from bias
    return out


def legend_line(theme: Theme, index: int, marker: bool = False, hollow: bool = False) -> Any:
    """Return a handle for the legend: the line of run number ``index``, with its marker."""
    from matplotlib.lines import Line2D

    color = theme.color(index)
    return Line2D(
        [],
        [],
        color=color,
        linestyle=theme.dash(index),
        marker=theme.marker(index) if marker else "",
        markerfacecolor=theme.background if hollow else color,
        markeredgecolor=color,
    )


def percent_axis(axis: Any) -> None:
    """Print the ticks of ``axis``, fractions of 1, in per cent."""
    from matplotlib.ticker import PercentFormatter

    axis.set_major_formatter(PercentFormatter(xmax=1))
