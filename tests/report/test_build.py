"""The report folder and its page: whole, self-contained, escaped, replaced by a second run."""

from __future__ import annotations

import base64
import html
import json
import os
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest

pytest.importorskip("matplotlib")

from mor.errors import MorError
from mor.report import Sample, build, build_report, load_runs, markdown_table
from mor.report.html import render_page
from mor.report.plots import PLOT_NAMES

MakeRun = Callable[..., Path]
TEXT = {"table.md", "table.csv", "results.jsonl", "index.html"}


class Page(HTMLParser):
    """Collects what the tests ask of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.cells: list[str] = []
        self._cell = False
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {key: value or "" for key, value in attrs}))
        if tag == "td":
            self._cell = True
            self.cells.append("")

    def handle_endtag(self, tag: str) -> None:
        if tag == "td":
            self._cell = False

    def handle_data(self, data: str) -> None:
        if self._cell:
            self.cells[-1] += data

    def resources(self) -> list[str]:
        keys = ("src", "srcset", "href", "action", "data", "poster")
        return [attrs[key] for _, attrs in self.tags for key in keys if key in attrs]


def test_folder_is_whole_and_replaced(four_runs: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "deep" / "report"
    index = build_report(four_runs, out, title="Four runs")
    assert index == out / "index.html"
    of_text = set(PLOT_NAMES) - {"image_depth", "sound_depth"}
    pictures = {f"{name}.png" for name in of_text}
    assert set(os.listdir(out)) == TEXT | pictures
    assert markdown_table(load_runs(four_runs)) in (out / "table.md").read_text()
    results = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    for folder, result in zip(four_runs, results, strict=True):
        summary = json.loads((folder / "summary.json").read_text())
        evaluation = json.loads((folder / "eval.json").read_text())
        assert {key: result[key] for key in summary} == summary
        assert result["eval"]["causal"]["nll"] == evaluation["causal"]["nll"]
        assert "sample" not in result["eval"]
    page = Page(index.read_text())
    embedded = [
        base64.b64decode(uri.removeprefix("data:image/png;base64,"))
        for uri in page.resources()
        if uri.startswith("data:image/png")
    ]
    assert all((out / name).read_bytes() in embedded for name in pictures)
    assert len(embedded) == 2 * len(pictures)

    (out / "mine.txt").write_text("kept")
    build_report(four_runs[:1], out)
    assert set(os.listdir(out)) == TEXT | {"mine.txt", "loss_vs_flops.png", "loss_vs_tokens.png"}
    assert len((out / "results.jsonl").read_text().splitlines()) == 1
    assert os.listdir(out.parent) == ["report"]


def test_failure_leaves_the_old_report(
    four_runs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "draw_plots", lambda runs: [])
    out = tmp_path / "report"
    build_report(four_runs, out)
    before = (out / "index.html").read_bytes()
    (four_runs[1] / "summary.json").write_text("{}")
    with pytest.raises(MorError):
        build_report(four_runs, out)
    assert (out / "index.html").read_bytes() == before
    assert sorted(os.listdir(tmp_path)) == ["report", "runs"]
    with pytest.raises(MorError, match="is a file"):
        build_report(four_runs[:1], out / "index.html")
    with pytest.raises(MorError, match="cannot be written"):
        build_report(four_runs[:1], out / "index.html" / "inside")


def test_page_needs_nothing_from_outside(four_runs: list[Path]) -> None:
    page = render_page("Four", load_runs(four_runs), [])
    assert not re.search(r"https?://", page)
    assert all(uri.startswith("data:") for uri in Page(page).resources())
    assert "@import" not in page
    assert "url(" not in page
    assert "prefers-color-scheme:dark" in page


def test_page_shows_the_numbers_of_the_table(four_runs: list[Path]) -> None:
    runs = load_runs(four_runs)
    parsed = Page(render_page("Four", runs, []))
    for cell in re.findall(r"\| +([^|]*?) +(?=\|)", markdown_table(runs[3:]).splitlines()[2])[1:]:
        assert cell in parsed.cells
    assert "3.8700" in parsed.cells


def test_every_token_has_its_depth(four_runs: list[Path]) -> None:
    runs = load_runs(four_runs)
    page = render_page("Four", runs, [])
    assert 'id="run-0"' not in page  # vanilla has no recursion to show
    for index, run in list(enumerate(runs))[1:]:
        section = page[page.index(f'id="run-{index}"') :].split("</section>")[0]
        found = re.findall(r'<span class="t d(\d)" title="([^"]*)">', section)
        assert run.eval is not None
        assert run.eval.sample is not None
        sample = run.eval.sample
        assert [int(depth) for depth, _ in found] == sample.depths
        for (_, title), depth, nll in zip(found, sample.depths, sample.nll, strict=True):
            assert title == f"depth {depth} of 3, NLL {nll:.3f} nats"
        for token in set(sample.tokens):
            assert html.escape(token.strip()) in section
        for depth in range(4):
            assert f'<b class="d{depth}">{depth}</b>' in section
            assert f".r3 .d{depth}{{" in page


def test_all_text_is_escaped(make_run: MakeRun) -> None:
    evil = "<script>alert('x')</script>\"&"
    folder = make_run(
        "evil",
        summary={"name": evil, "machine": evil, "commit": evil, "command": evil},
        evaluation={
            "data": evil,
            "sample": {"tokens": [evil, "</div>"], "depths": [1, 2], "nll": [0.1, 0.2]},
        },
    )
    plain = render_page("plain", load_runs([make_run("plain")]), [])
    extra = {evil: [Sample(tokens=[evil], depths=[3], title=evil)]}
    page = render_page(evil, load_runs([folder]), [], extra)
    assert "<script>alert" not in page
    assert page.count("<script") == plain.count("<script") == 1
    assert page.count("</div>") == plain.count("</div>") + 1  # the second passage's own
    assert html.escape(evil).replace("&quot;", "&#34;").replace("&#x27;", "&#39;") in page
    assert html.escape(evil) in page  # the tokens


def test_one_run_without_evaluation_or_log(make_run: MakeRun, tmp_path: Path) -> None:
    folder = make_run("bare", summary={"tokens_per_s": None, "command": None})
    (folder / "eval.json").unlink()
    (folder / "log.jsonl").unlink()
    page = build_report([folder], tmp_path / "report").read_text()
    assert "Depth, token by token" not in page
    assert "<img" not in page
    assert "not scored at depth caps" in page


def test_shared_conditions_stand_once(four_runs: list[Path], make_run: MakeRun) -> None:
    page = render_page("Four", load_runs(four_runs), [])
    assert page.count("Some processor, 2 cores") == 1
    assert page.count("mor train recipes/demo/") == 4
    other = make_run("elsewhere", summary={"machine": "Another one"})
    page = render_page("Five", load_runs([*four_runs, other]), [])
    assert page.count("Some processor, 2 cores") == 4
    assert page.count("Another one") == 1


def test_more_passages(make_run: MakeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "draw_plots", lambda runs: [])
    folder = make_run("mor")
    written = Sample(tokens=["Good", " morrow"], depths=[1, 3], title="Text it wrote")
    page = build_report([folder], tmp_path / "out", passages={"mor": [written]}).read_text()
    assert "Text it wrote: 2 tokens, mean depth 2.00 of 3." in page
    assert '<span class="t d3" title="depth 3 of 3"> morrow</span>' in page
    with pytest.raises(MorError, match="no run is called 'other'"):
        build_report([folder], tmp_path / "out", passages={"other": [written]})
    deep = Sample(tokens=["x"], depths=[4])
    with pytest.raises(MorError, match="is 4; 0 to 3"):
        build_report([folder], tmp_path / "out", passages={"mor": [deep]})
