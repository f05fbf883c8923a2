"""Put ``docs/LOG.md`` in order: sections with the newest first, and an index at the top.

    python tools/log.py          # rewrites docs/LOG.md

Write a new section anywhere in the file, under a heading that begins with its date
(``## 2026-11-25 Title``), and run this. Sections of one day keep their order.
"""

from __future__ import annotations

import re
from datetime import date
from pathlib import Path

LOG = Path(__file__).resolve().parents[1] / "docs" / "LOG.md"
INDEX = "<!-- index -->"
_DATED = re.compile(r"(\d{4}-\d{2}-\d{2}) (\S.*)")


def slug(heading: str) -> str:
    """The anchor that GitHub, and our site, give to a heading."""
    kept = re.sub(r"[^\w\- ]", "", heading.strip().lower())
    return kept.replace(" ", "-")


def headings(text: str) -> list[str]:
    """The second-level headings of a page, code blocks left out."""
    outside = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    return re.findall(r"^## (.+)$", outside, re.MULTILINE)


def arrange(text: str) -> str:
    """The log with its sections in order and its index renewed.

    Raises:
        ValueError: a heading does not begin with a date and a title, or the index's mark is gone.
    """
    head, *sections = re.split(r"^## ", text, flags=re.MULTILINE)
    dated = [(date_of(section.partition("\n")[0]), section.strip()) for section in sections]
    dated.sort(key=lambda pair: pair[0], reverse=True)
    before, mark, _ = head.partition(INDEX)
    if not mark:
        raise ValueError(f"the text before the first section has no line {INDEX}")
    titles = [section.partition("\n")[0] for _, section in dated]
    index = "\n".join(f"- [{title}](#{slug(title)})" for title in titles)
    body = "\n\n".join(f"## {section}" for _, section in dated)
    return f"{before}{INDEX}\n{index}\n\n{body}\n"


def date_of(heading: str) -> date:
    """The date that a heading begins with.

    Raises:
        ValueError: it begins with none, or has no title after it.
    """
    match = _DATED.fullmatch(heading.strip())
    if match is None:
        raise ValueError(f"heading {heading!r} must look like: 2026-11-25 What was tried")
    return date.fromisoformat(match[1])


if __name__ == "__main__":
    LOG.write_text(arrange(LOG.read_text("utf-8")), "utf-8")
