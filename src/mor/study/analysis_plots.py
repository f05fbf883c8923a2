"""The plots of a routing analysis, and its page."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mor.report.colors import depth_css, render_html
from mor.report.style import LIGHT, new_figure, run_legend, styled, to_png
from mor.study.analysis import Analysed, group_tables, router_table, sample_passage
from mor.study.pages import Pages, write_pages

Models = Mapping[str, Analysed]
Records = Sequence[Mapping[str, Any]]


def draw_groups(records: Records, question: str) -> bytes | None:
    """Mean depth of each kind of token, the models beside each other; None without any."""
    mine = [record for record in records if record["question"] == question]
    if not mine:
        return None
    models = list(dict.fromkeys(record["model"] for record in mine))
    groups = list(dict.fromkeys(record["group"] for record in mine))
    with styled(LIGHT):
        figure, (axes,) = new_figure(height=1.6 + 0.28 * len(groups) * max(1, len(models) * 0.6))
        width, bars = 0.8 / len(models), []
        for place, model in enumerate(models):
            depth = {r["group"]: r["mean_depth"] for r in mine if r["model"] == model}
            shown = [number for number, group in enumerate(groups) if group in depth]
            at = [number + (place - (len(models) - 1) / 2) * width for number in shown]
            values = [depth[groups[number]] for number in shown]
            bars.append(axes.barh(at, values, width * 0.92, color=LIGHT.color(place)))
        axes.set_yticks(range(len(groups)), groups)
        axes.invert_yaxis()
        axes.grid(False, axis="y")
        least = min(record["mean_depth"] for record in mine)
        axes.set_xlim(left=min(1.0, least))
        axes.set_xlabel("recursions per token")
        axes.set_title(f"By {question}")
        run_legend(figure, bars, models)
        return to_png(figure)


def draw_scores(models: Models) -> bytes | None:
    """What decides at each depth: those that went on and those that left, with the boundary.

    A depth that every token runs decides nothing, and has no panel.
    """
    panels = [
        (f"{name}, depth {depth}", values, active, model.routes.boundaries[depth : depth + 1])
        for name, model in models.items()
        for depth, (values, active) in enumerate(model.routes.scores)
        if len(values) > 1 and not (model.routes.boundaries and active.all())
    ]
    if not panels:
        return None
    rows = -(-len(panels) // 2)
    with styled(LIGHT):
        figure, all_axes = new_figure(rows, 2, height=0.8 + 2.1 * rows)
        for axes, (title, values, active, boundary) in zip(all_axes, panels, strict=False):
            edges = np.histogram_bin_edges(values, 40)
            for place, (mask, label) in enumerate(((~active, "leave"), (active, "go on"))):
                if mask.any():
                    color = LIGHT.color(place)
                    axes.hist(values[mask], edges, alpha=0.65, color=color, label=label)
            if boundary:
                axes.axvline(boundary[0], color=LIGHT.ink, linestyle="--", linewidth=1.2)
            axes.set_title(title, fontsize=10)
            axes.set_yticks([])
        for spare in all_axes[len(panels) :]:
            spare.set_visible(False)
        all_axes[0].legend(fontsize=9)
        figure.supxlabel("router score (the gate, for token choice)", fontsize=11)
        return to_png(figure)


def draw_positions(models: Models) -> bytes:
    """Share of sequences that run the deepest pass at each position: is any position dead?"""
    with styled(LIGHT):
        figure, (axes,) = new_figure()
        handles = []
        for place, model in enumerate(models.values()):
            routes = model.routes
            share = (routes.depths == routes.recursions).mean(0)
            handles += axes.plot(share, color=LIGHT.color(place), linewidth=1.0)
        axes.set_xlabel("position in the sequence")
        axes.set_ylabel("share that runs the deepest pass")
        axes.set_ylim(bottom=0)
        run_legend(figure, handles, list(models))
        return to_png(figure)


def write_analysis(models: Models, records: Records, title: str, out: Path) -> Path:
    """Write `tokens.jsonl`, `report.md`, plots and `index.html` with a coloured passage.

    Raises:
        MorError: matplotlib is not installed, or `out` cannot be written.
    """
    plots = {
        "speech": draw_groups(records, "part of speech"),
        "word": draw_groups(records, "place in the word"),
        "entropy": draw_groups(records, "entropy of the next token"),
        "scores": draw_scores(models),
        "positions": draw_positions(models),
    }
    passages = []
    for name, model in models.items():
        depth, passage = model.routes.recursions, sample_passage(model)
        spans = render_html(passage["tokens"], passage["depths"], depth, passage["nll"])
        passages.append(
            f"<h2>A passage, coloured by depth: {html.escape(name)}</h2>"
            f'<p class="passage r{depth}">{spans}</p>'
        )
    depths = sorted({model.routes.recursions for model in models.values()})
    style = "".join(map(depth_css, depths)) + ".passage{white-space:pre-wrap;line-height:1.9}"
    tables = [router_table(records), *group_tables(records)]
    shown = {stem: png for stem, png in plots.items() if png is not None}
    pages = Pages(title, "", tables, shown, passages, style)
    return write_pages(pages, [dict(record) for record in records], out, "tokens")
