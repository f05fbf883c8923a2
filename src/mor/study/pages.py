"""Tables and plots as files: JSON lines, Markdown, PNG, one page of HTML."""

from __future__ import annotations

import base64
import html
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mor.disk import append_jsonl
from mor.errors import MorError
from mor.provenance import provenance
from mor.study.tables import Table

Record = dict[str, Any]

_STYLE = (
    "body{font:16px/1.5 system-ui,sans-serif;max-width:75rem;margin:2rem auto;padding:0 1rem;"
    "color:#1d2330;background:#fff}table{border-collapse:collapse;display:block;overflow-x:auto}"
    "td,th{border-bottom:1px solid #e3e6ec;padding:.3rem .6rem;text-align:right;"
    "white-space:nowrap}td:first-child,th:first-child{text-align:left}img{max-width:100%}"
)


@dataclass(frozen=True)
class Pages:
    """What a report shows.

    Attributes:
        title: heading. note: below it.
        tables: in order.
        plots: PNG by file stem.
        passages: HTML that is shown as it is, such as a coloured text, with its style in `style`.
        style: more CSS.
    """

    title: str
    note: str
    tables: Sequence[Table]
    plots: Mapping[str, bytes]
    passages: Sequence[str] = ()
    style: str = ""


def write_pages(pages: Pages, records: Sequence[Record], out: Path, name: str = "results") -> Path:
    """Write `NAME.jsonl`, `report.md`, PNG plots and `index.html`, the page last.

    Args:
        pages: what is shown.
        records: a JSON line each; where they come from is added.
        out: folder; its parents are made.
        name: of the JSON lines.

    Returns:
        The path of `index.html`.

    Raises:
        MorError: `out` cannot be written.
    """
    origin = provenance()
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".report-", dir=out) as folder:
            made = Path(folder)
            for record in records:
                append_jsonl(made / f"{name}.jsonl", record | {"provenance": origin})
            for stem, png in pages.plots.items():
                (made / f"{stem}.png").write_bytes(png)
            (made / "report.md").write_text(_markdown(pages), encoding="utf-8")
            (made / "index.html").write_text(_page(pages), encoding="utf-8")
            for file in sorted(os.listdir(made), key=lambda file: (file == "index.html", file)):
                os.replace(made / file, out / file)
    except OSError as error:
        raise MorError(f"out={out} cannot be written: {error.strerror or error}") from None
    return out / "index.html"


def _markdown(pages: Pages) -> str:
    parts = [f"# {pages.title}", pages.note, *(table.markdown() for table in pages.tables)]
    parts += [f"![{stem}]({stem}.png)" for stem in pages.plots]
    return "\n\n".join(part.strip() for part in parts if part.strip()) + "\n"


def _page(pages: Pages) -> str:
    title = html.escape(pages.title)
    parts = [f"<h1>{title}</h1>", f"<p>{html.escape(pages.note)}</p>"]
    for table in pages.tables:
        heads = "".join(f"<th>{html.escape(name)}</th>" for name in table.columns)
        lines = "".join(
            "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>"
            for row in table.rows
        )
        parts.append(
            f"<h2>{html.escape(table.title)}</h2><table><tr>{heads}</tr>{lines}</table>"
            f"<p>{html.escape(table.note)}</p>"
        )
    for stem, png in pages.plots.items():
        data = base64.b64encode(png).decode()
        parts.append(f'<img alt="{stem}" src="data:image/png;base64,{data}">')
    parts += pages.passages
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{_STYLE}{pages.style}</style>'
        f"<body>{''.join(parts)}</body></html>\n"
    )
