"""Build a report folder from run folders."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mor.disk import append_jsonl, check_folder
from mor.errors import MorError
from mor.report import tables
from mor.report.html import render_page
from mor.report.plots import PLOT_NAMES, draw_plots
from mor.report.records import Run, Sample, check_depths, load_runs


def build_report(
    run_dirs: Sequence[str | Path],
    out: str | Path,
    title: str = "Mixture-of-Recursions: runs compared",
    passages: Mapping[str, Sequence[Sample]] | None = None,
) -> Path:
    """Write ``table.md``, ``table.csv``, ``results.jsonl``, PNG plots and ``index.html``.

    Everything is made before the first file of ``out`` is touched, and each file is replaced
    whole, ``index.html`` last; it holds all it shows, so it is right at every moment. Files that a
    report does not write are left alone, and plots of an earlier report go.

    Args:
        run_dirs: run folders (:mod:`mor.report.records`), in the order of the table.
        out: the folder to write; its parents are made.
        title: heading of the page.
        passages: more passages by run name, such as text the model wrote, shown on the page
            after the run's sample.

    Returns:
        The path of ``index.html``.

    Raises:
        MorError: a run folder is wrong, matplotlib is absent, ``passages`` names a run that is not
            there, or ``out`` cannot be written.
    """
    out = Path(out)
    check_folder(out)
    runs = load_runs(run_dirs)
    _check_passages(runs, passages or {})
    plots = draw_plots(runs)
    page = render_page(title, runs, plots, passages)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as folder:
            made = Path(folder)
            (made / "table.md").write_text(_markdown(title, runs), encoding="utf-8")
            (made / "table.csv").write_text(tables.csv_table(runs), encoding="utf-8")
            for run in runs:
                append_jsonl(made / "results.jsonl", _result(run))
            for plot in plots:
                (made / f"{plot.name}.png").write_bytes(plot.png)
            (made / "index.html").write_text(page, encoding="utf-8")
            _move(made, out)
    except OSError as error:
        raise MorError(f"out={out} cannot be written: {error.strerror}") from None
    return out / "index.html"


def _move(made: Path, out: Path) -> None:
    out.mkdir(exist_ok=True)
    names = sorted(os.listdir(made), key=lambda name: (name == "index.html", name))
    for name in names:
        os.replace(made / name, out / name)
    for stale in PLOT_NAMES:
        if f"{stale}.png" not in names:
            (out / f"{stale}.png").unlink(missing_ok=True)


def _markdown(title: str, runs: Sequence[Run]) -> str:
    depth = "".join(f"- {tables.depth_sentence(run)}\n" for run in runs)
    notes = "\n".join(tables.notes(runs))
    table = tables.markdown_table(runs)
    return f"# {title}\n\n{table}\nWhat depth buys:\n\n{depth}\n{notes}\n"


def _result(run: Run) -> dict[str, Any]:
    """One line of results.jsonl: the summary, and the evaluation without what it shows."""
    record = {"label": run.label, **run.summary.model_dump()}
    record["eval"] = run.eval.model_dump(exclude={"sample", "shown"}) if run.eval else None
    return record


def _check_passages(runs: Sequence[Run], passages: Mapping[str, Sequence[Sample]]) -> None:
    by_label = {run.label: run for run in runs}
    for label, samples in passages.items():
        if label not in by_label:
            raise MorError(f"passages: no run is called {label!r}; there are {sorted(by_label)}")
        for sample in samples:
            depth = by_label[label].summary.num_recursions
            check_depths(sample.depths, depth, f"passages[{label!r}].depths")
