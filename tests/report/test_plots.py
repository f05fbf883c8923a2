"""Plots are drawn where there are numbers, and only there."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from mor.errors import MorError
from mor.report.records import load_run, load_runs

pytest.importorskip("matplotlib")

from matplotlib import rcParams
from PIL import Image

from mor.report import plots, router_plots
from mor.report.style import DARK, LIGHT, power_of_ten, short, smooth, styled

MakeRun = Callable[..., Path]


def is_picture(png: bytes | None) -> bool:
    """Whether this is a whole PNG on which something was drawn."""
    assert png is not None
    image = Image.open(io.BytesIO(png))
    image.load()
    return image.format == "PNG" and min(image.size) > 250 and len(image.getcolors() or "x" * 9) > 8


def test_all_plots_of_the_demo(four_runs: list[Path]) -> None:
    before = dict(rcParams)
    drawn = plots.draw_plots(load_runs(four_runs))
    of_text = [name for name in plots.PLOT_NAMES if name not in ("image_depth", "sound_depth")]
    assert [plot.name for plot in drawn] == of_text
    for plot in drawn:
        assert is_picture(plot.png)
        assert is_picture(plot.png_dark)
        assert plot.png != plot.png_dark
    assert dict(rcParams) == before


def test_plots_without_numbers_are_left_out(make_run: MakeRun) -> None:
    vanilla = load_run(make_run("vanilla", family="vanilla", router="none", num_recursions=1))
    assert [plot.name for plot in plots.draw_plots([vanilla])] == [
        "loss_vs_flops",
        "loss_vs_tokens",
    ]
    assert plots.draw_plots([replace(vanilla, log=[], eval=None)]) == []


def test_only_what_a_router_decides_is_plotted(make_run: MakeRun) -> None:
    run = load_run(make_run("mor"))
    every = {"router/active_fraction/0": 1.0, "router/accuracy/0": 1.0, "router/boundary/0": 0.0}
    logged = replace(run, log=[{**row, **every} for row in run.log])
    fixed = replace(logged, summary=logged.summary.model_copy(update={"router": "fixed"}))
    with styled(LIGHT):
        assert router_plots.boundary([logged], LIGHT) == router_plots.boundary([run], LIGHT)
        assert router_plots.accuracy([logged], LIGHT) == router_plots.accuracy([run], LIGHT)
        for draw in (router_plots.boundary, router_plots.accuracy, router_plots.active_fraction):
            assert draw([fixed], LIGHT) is None


def test_one_row_of_log_and_gaps(make_run: MakeRun) -> None:
    run = load_run(make_run("short", rows=1, summary={"capacities": None}))
    sparse = replace(run, log=[*run.log, {"step": 20, "tokens": 3e6, "loss": float("nan")}])
    with styled(LIGHT):
        assert is_picture(plots.loss_against_tokens([sparse], LIGHT))
        assert is_picture(router_plots.active_fraction([sparse], LIGHT))
        start = replace(run, log=[{"step": 0, "tokens": 0, "loss": 9.0}])
        assert plots.loss_against_tokens([start], LIGHT) is None


def test_many_runs_and_odd_names(make_run: MakeRun) -> None:
    names = ["_hidden", "a$b$c", "x" * 80, "two\nlines", *(f"run {index}" for index in range(6))]
    runs = load_runs(
        [make_run(f"r{i}", rows=3, summary={"name": name}) for i, name in enumerate(names)]
    )
    with styled(DARK):
        assert is_picture(plots.nll_against_cap(runs, DARK))
        assert is_picture(router_plots.depth_histogram(runs, DARK))
        assert is_picture(router_plots.active_fraction(runs, DARK))
    assert all(len(short(name)) <= 30 and not short(name).startswith("_") for name in names)
    looks = {(DARK.color(index), str(DARK.dash(index))) for index in range(len(names))}
    assert len(looks) == len(names)


def test_scales_names_and_means() -> None:
    assert short("a rather long name of a run, the second #2", 20) == "a rather long…ond #2"
    assert power_of_ten(3.2e13) == (1e12, " (in 10¹²)")
    assert power_of_ten(12.0) == (1.0, "")
    assert power_of_ten(0.0) == (1.0, "")
    assert smooth([2.0, 4.0]) == [2.0, 4.0]
    assert smooth([5.0] * 100) == pytest.approx([5.0] * 100)
    rising = [float(value) for value in range(100)]
    assert smooth(rising)[10:90] == pytest.approx(rising[10:90])


def test_missing_matplotlib_names_the_extra(
    four_runs: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MorError, match=r"matplotlib, .*pip install -e '\.\[report\]'"):
        plots.draw_plots(load_runs(four_runs))
