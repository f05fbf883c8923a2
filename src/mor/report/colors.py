"""Tokens coloured by depth, in the terminal and in HTML.

Depth here counts the recursions a token went through: 0 to ``num_recursions``. The scale is safe
for colour-blind readers because lightness alone orders it, and it always sets both background and
foreground, so it reads the same on dark and on light terminals.
"""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass

from rich.style import Style
from rich.text import Text

from mor.errors import MorError
from mor.report.records import check_depths

Rgb = tuple[float, float, float]

# More depth is more ink on light paper, more light on a dark page.
_LIGHT = ("#fdf3c4", "#93d2b0", "#2e75a6", "#25205f")
_DARK = ("#2a2d3e", "#2b5a86", "#2f9a9a", "#8fcf7f", "#f3ea9b")


@dataclass(frozen=True)
class DepthColor:
    """The colours of one depth, as ``#rrggbb``."""

    background: str
    foreground: str


def depth_colors(num_recursions: int, dark: bool = False) -> list[DepthColor]:
    """Return one colour for each depth 0..num_recursions, lightness falling (rising if dark)."""
    if num_recursions < 1:
        raise MorError(f"num_recursions is {num_recursions}; at least 1 would be right")
    shades = [_shade(depth / num_recursions, dark) for depth in range(num_recursions + 1)]
    return [DepthColor(shade, _readable_on(shade)) for shade in shades]


def render_terminal(
    tokens: Sequence[str], depths: Sequence[int], num_recursions: int, legend: bool = True
) -> Text:
    """Return the passage with every token on the colour of its depth, a legend above it.

    Args:
        tokens: T decoded strings, with their leading spaces and newlines.
        depths: T recursion counts, each 0..num_recursions.
        num_recursions: R, the deepest count there can be.
        legend: put the legend above.

    Raises:
        MorError: lengths differ, or a depth lies outside 0..num_recursions.
    """
    _check(tokens, depths, num_recursions)
    styles = [
        Style(color=color.foreground, bgcolor=color.background)
        for color in depth_colors(num_recursions)
    ]
    text = Text()
    if legend:
        text.append("recursions per token: ")
        for depth, style in enumerate(styles):
            text.append(f" {depth} ", style)
            text.append(" ")
        text.append("\n\n")
    for token, depth in zip(tokens, depths, strict=True):
        for piece, is_break in _pieces(token):
            # A newline has a depth too: a visible mark carries it, the break itself stays bare.
            text.append("⏎" if is_break else piece.replace("\t", "    "), styles[depth])
            if is_break:
                text.append("\n")
    return text


def render_html(
    tokens: Sequence[str],
    depths: Sequence[int],
    num_recursions: int,
    nll: Sequence[float | None] = (),
) -> str:
    """Return the passage as HTML: one ``<span class="t dN">`` per token, all text escaped.

    The span's title gives depth and, where known, NLL (nats). :func:`depth_css` colours it inside
    an element of class ``rR``.

    Raises:
        MorError: as in :func:`render_terminal`.
    """
    _check(tokens, depths, num_recursions)
    spans = []
    for index, (token, depth) in enumerate(zip(tokens, depths, strict=True)):
        title = f"depth {depth} of {num_recursions}"
        cost = nll[index] if nll else None
        if cost is not None:
            title += f", NLL {cost:z.3f} nats"
        shown = "".join(
            '<span class="nl">⏎</span>\n' if is_break else html.escape(piece)
            for piece, is_break in _pieces(token)
        )
        spans.append(f'<span class="t d{depth}" title="{title}">{shown}</span>')
    return "".join(spans)


def depth_css(num_recursions: int, dark: bool = False) -> str:
    """Return the style rules for ``.rR .d0`` to ``.rR .dR``."""
    return "\n".join(
        f".r{num_recursions} .d{depth}{{background:{color.background};color:{color.foreground}}}"
        for depth, color in enumerate(depth_colors(num_recursions, dark))
    )


def depth_line_colors(num_recursions: int, dark: bool = False) -> list[str]:
    """Return a line colour for each depth 0..R-1, strong enough for a plot's background."""
    steps = range(num_recursions)
    return [_shade(0.55 + 0.45 * step / max(1, num_recursions - 1), dark) for step in steps]


def contrast(one: str, other: str) -> float:
    """Return the contrast ratio of two ``#rrggbb`` colours, 1 to 21 (WCAG 2.2, 1.4.3)."""
    dim, bright = sorted((luminance(one), luminance(other)))
    return (bright + 0.05) / (dim + 0.05)


def luminance(color: str) -> float:
    """Return the relative luminance of ``#rrggbb``, 0 to 1 (WCAG 2.2)."""
    red, green, blue = (
        part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in _rgb(color)
    )
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def printable(text: str) -> str:
    """Replace control characters, newline and tab apart: a token must not steer the terminal."""
    return "".join(
        char
        if char in "\n\t" or not (ord(char) < 32 or 127 <= ord(char) < 160)
        else chr(0x2400 + ord(char))
        if ord(char) < 32
        else "\ufffd"
        for char in text
    )


def _pieces(token: str) -> list[tuple[str, bool]]:
    """Split a token into text and line breaks: (text, False) or ("", True), in order."""
    pieces: list[tuple[str, bool]] = []
    for index, part in enumerate(printable(token.replace("\r\n", "\n")).split("\n")):
        if index:
            pieces.append(("", True))
        if part:
            pieces.append((part, False))
    return pieces


def _check(tokens: Sequence[str], depths: Sequence[int], num_recursions: int) -> None:
    if len(tokens) != len(depths):
        raise MorError(f"depths has {len(depths)} entries; {len(tokens)}, one per token, is right")
    check_depths(depths, num_recursions, "depths")


def _shade(position: float, dark: bool) -> str:
    anchors = _DARK if dark else _LIGHT
    place = position * (len(anchors) - 1)
    index = min(int(place), len(anchors) - 2)
    low, high = _rgb(anchors[index]), _rgb(anchors[index + 1])
    mixed = (a + (b - a) * (place - index) for a, b in zip(low, high, strict=True))
    return "#" + "".join(f"{round(255 * part):02x}" for part in mixed)


def _readable_on(background: str) -> str:
    return max(("#000000", "#ffffff"), key=lambda ink: contrast(ink, background))


def _rgb(color: str) -> Rgb:
    red, green, blue = (int(color[start : start + 2], 16) / 255 for start in (1, 3, 5))
    return red, green, blue
