"""The report of a study: JSON lines, tables in Markdown, plots, one page of HTML."""

from __future__ import annotations

import base64
import html
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mor.disk import append_jsonl
from mor.errors import MorError
from mor.provenance import provenance
from mor.study.file import Study
from mor.study.plots import draw_study
from mor.study.tables import Table, comparison, grid_tables, law_table

Record = dict[str, Any]

_STYLE = (
    "body{font:16px/1.5 system-ui,sans-serif;max-width:75rem;margin:2rem auto;padding:0 1rem;"
    "color:#1d2330;background:#fff}table{border-collapse:collapse;display:block;overflow-x:auto}"
    "td,th{border-bottom:1px solid #e3e6ec;padding:.3rem .6rem;text-align:right;"
    "white-space:nowrap}td:first-child,th:first-child{text-align:left}img{max-width:100%}"
)


def write_report(study: Study, records: Sequence[Record], out: Path) -> Path:
    """Write `results.jsonl`, `report.md`, PNG plots and `index.html`, the page last.

    Args:
        study: what was asked.
        records: of `run_study`, at least one.
        out: folder; its parents are made.

    Returns:
        The path of `index.html`.

    Raises:
        MorError: there is no record, matplotlib is not installed, or `out` cannot be written.
    """
    if not records:
        raise MorError(f"the study {study.title!r} has no finished run to report")
    law = law_table(records)
    tables = [comparison(study, records), *grid_tables(study, records), *([law] if law else [])]
    plots = draw_study(records)
    origin = provenance()
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".report-", dir=out) as folder:
            made = Path(folder)
            for record in records:
                append_jsonl(made / "results.jsonl", record | {"provenance": origin})
            for stem, png in plots.items():
                (made / f"{stem}.png").write_bytes(png)
            (made / "report.md").write_text(_markdown(study, tables, plots), encoding="utf-8")
            (made / "index.html").write_text(_page(study, tables, plots), encoding="utf-8")
            for name in sorted(os.listdir(made), key=lambda name: (name == "index.html", name)):
                os.replace(made / name, out / name)
    except OSError as error:
        raise MorError(f"out={out} cannot be written: {error.strerror or error}") from None
    return out / "index.html"


def _markdown(study: Study, tables: Sequence[Table], plots: dict[str, bytes]) -> str:
    parts = [f"# {study.title}", study.note, *(table.markdown() for table in tables)]
    parts += [f"![{stem}]({stem}.png)" for stem in plots]
    return "\n\n".join(part.strip() for part in parts if part.strip()) + "\n"


def _page(study: Study, tables: Sequence[Table], plots: dict[str, bytes]) -> str:
    title = html.escape(study.title)
    parts = [f"<h1>{title}</h1>", f"<p>{html.escape(study.note)}</p>"]
    for table in tables:
        heads = "".join(f"<th>{html.escape(name)}</th>" for name in table.columns)
        lines = "".join(
            "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>"
            for row in table.rows
        )
        parts.append(
            f"<h2>{html.escape(table.title)}</h2><table><tr>{heads}</tr>{lines}</table>"
            f"<p>{html.escape(table.note)}</p>"
        )
    for stem, png in plots.items():
        data = base64.b64encode(png).decode()
        parts.append(f'<img alt="{stem}" src="data:image/png;base64,{data}">')
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{_STYLE}</style>'
        f"<body>{''.join(parts)}</body></html>\n"
    )
