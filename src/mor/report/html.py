"""The report as one self-contained HTML page: no asset outside it, no network, all text escaped."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any

from jinja2 import Environment, StrictUndefined

from mor.report import tables
from mor.report.colors import depth_css, render_html
from mor.report.plots import Plot
from mor.report.records import Run, Sample
from mor.report.style import DARK, LIGHT

_ORIGIN = ("machine", "commit", "versions", "data", "command", "seed")


def render_page(
    title: str,
    runs: Sequence[Run],
    plots: Sequence[Plot],
    passages: Mapping[str, Sequence[Sample]] | None = None,
) -> str:
    """The report as one self-contained HTML page.

    Args:
        title: heading of the page.
        runs: the runs, in the order of the table.
        plots: their plots (:func:`mor.report.plots.draw_plots`), embedded as base64.
        passages: more passages by run label, shown after the run's own sample.
    """
    columns = tables.columns(runs)
    depths = sorted({run.summary.num_recursions for run in runs})
    environment = Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined
    )
    template = resources.files("mor.report").joinpath("page.html").read_text(encoding="utf-8")
    return environment.from_string(template).render(
        title=title,
        runs=runs,
        shared=_shared_origin(runs),
        own=_own_origin(runs),
        columns=columns,
        sentences=[tables.depth_sentence(run) for run in runs],
        notes=tables.notes(runs),
        plots=[
            {
                "title": plot.title,
                "caption": plot.caption,
                "light": _data_uri(plot.png),
                "dark": _data_uri(plot.png_dark),
            }
            for plot in plots
        ],
        spoken=_spoken(runs, passages or {}),
        css_light="\n".join(depth_css(depth) for depth in depths),
        css_dark="\n".join(depth_css(depth, dark=True) for depth in depths),
        run_colors=[(LIGHT.color(index), DARK.color(index)) for index in range(len(runs))],
    )


def _spoken(runs: Sequence[Run], passages: Mapping[str, Sequence[Sample]]) -> list[dict[str, Any]]:
    """The runs that have a passage to show, each with its passages as HTML."""
    spoken = []
    for index, run in enumerate(runs):
        samples = [run.eval.sample] if run.eval and run.eval.sample else []
        samples += passages.get(run.label, [])
        if run.summary.num_recursions > 1 and samples:
            spoken.append(
                {
                    "index": index,
                    "label": run.label,
                    "depth": run.summary.num_recursions,
                    "passages": [_passage(run, sample) for sample in samples],
                }
            )
    return spoken


def _passage(run: Run, sample: Sample) -> dict[str, Any]:
    depth = run.summary.num_recursions
    mean = sum(sample.depths) / max(1, len(sample.depths))
    return {
        "title": sample.title or "A passage of validation text",
        "summary": f"{len(sample.tokens)} tokens, mean depth {mean:z.2f} of {depth}",
        "spans": render_html(sample.tokens, sample.depths, depth, sample.nll),
    }


def _origin(run: Run) -> dict[str, str]:
    summary, result = run.summary, run.eval
    data = " ".join(filter(None, (result.data, result.split))) if result else ""
    if result and result.tokens is not None:
        data += f" ({result.tokens:,} tokens scored)"
    said = {
        "machine": summary.machine,
        "commit": summary.commit,
        "versions": ", ".join(f"{name} {number}" for name, number in summary.versions.items()),
        "data": data.strip(),
        "command": summary.command,
        "seed": None if summary.seed is None else str(summary.seed),
    }
    return {key: said[key] or "-" for key in _ORIGIN}


def _shared_origin(runs: Sequence[Run]) -> dict[str, str]:
    """The conditions that all runs have in common."""
    origins = [_origin(run) for run in runs]
    return {key: origins[0][key] for key in _ORIGIN if len({o[key] for o in origins}) == 1}


def _own_origin(runs: Sequence[Run]) -> list[tuple[str, dict[str, str]]]:
    """The other conditions, run by run."""
    shared = _shared_origin(runs)
    own = [
        (run.label, {key: text for key, text in _origin(run).items() if key not in shared})
        for run in runs
    ]
    return [(label, origin) for label, origin in own if origin]


def _data_uri(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()
