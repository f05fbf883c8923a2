"""Depth colours: legible, ordered by lightness, and harmless whatever the token holds."""

from __future__ import annotations

import html
import re
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.style import Style

from mor.errors import MorError
from mor.report import colors

DEPTHS = st.integers(1, 12)
PASSAGES = st.lists(st.tuples(st.text(max_size=6), st.integers(0, 3)), max_size=12)
PLAIN = re.compile(r"<[^>]*>")


@given(num_recursions=DEPTHS, dark=st.booleans())
def test_every_shade_is_legible_and_lightness_orders_them(num_recursions: int, dark: bool) -> None:
    shades = colors.depth_colors(num_recursions, dark)
    assert len(shades) == num_recursions + 1
    for shade in shades:
        assert colors.contrast(shade.background, shade.foreground) >= 4.5
    light = [colors.luminance(shade.background) for shade in shades]
    assert all((after > before) is dark for before, after in pairwise(light))


@given(num_recursions=DEPTHS, dark=st.booleans())
def test_lines_stand_out_from_the_page(num_recursions: int, dark: bool) -> None:
    lines = colors.depth_line_colors(num_recursions, dark)
    assert len(lines) == num_recursions
    paper = "#171a21" if dark else "#ffffff"
    assert all(colors.contrast(line, paper) >= 3 for line in lines)


def test_terminal_passage_keeps_text_and_depth() -> None:
    text = colors.render_terminal(["To", " be", ",\n", "or"], [1, 3, 2, 0], 3)
    assert text.plain == "recursions per token:  0   1   2   3  \n\nTo be,⏎\nor"
    shades = colors.depth_colors(3)
    start = text.plain.index("To")
    for word, depth in (("To", 1), (" be", 3), (",", 2), ("⏎", 2), ("or", 0)):
        at = text.plain.index(word, start)
        shade = shades[depth]
        want = Style(color=shade.foreground, bgcolor=shade.background)
        assert want in [span.style for span in text.spans if span.start <= at < span.end]


@given(PASSAGES)
def test_terminal_never_passes_control_characters(passage: list[tuple[str, int]]) -> None:
    text = colors.render_terminal([t for t, _ in passage], [d for _, d in passage], 3)
    assert not [c for c in text.plain if c != "\n" and (ord(c) < 32 or 127 <= ord(c) < 160)]


@given(PASSAGES)
def test_html_has_one_span_per_token_and_loses_no_text(passage: list[tuple[str, int]]) -> None:
    tokens, depths = [t for t, _ in passage], [d for _, d in passage]
    page = colors.render_html(tokens, depths, 3)
    assert re.findall(r'<span class="t d(\d)"', page) == [str(depth) for depth in depths]
    shown = html.unescape(PLAIN.sub("", page.replace('<span class="nl">⏎</span>', "")))
    assert shown == "".join(colors.printable(token.replace("\r\n", "\n")) for token in tokens)


def test_html_escapes_and_tells_depth_and_nll() -> None:
    page = colors.render_html(["<script>", '"&'], [2, 0], 3, [1.23456, None])
    assert "<script>" not in page
    assert '<span class="t d2" title="depth 2 of 3, NLL 1.235 nats">&lt;script&gt;</span>' in page
    assert '<span class="t d0" title="depth 0 of 3">&quot;&amp;</span>' in page


def test_wrong_passages_are_refused() -> None:
    with pytest.raises(MorError, match="depths has 1 entries; 2"):
        colors.render_terminal(["a", "b"], [1], 3)
    with pytest.raises(MorError, match=r"depths\[1\] is 4; 0 to 3"):
        colors.render_html(["a", "b"], [1, 4], 3)
    with pytest.raises(MorError, match="num_recursions is 0"):
        colors.depth_colors(0)
