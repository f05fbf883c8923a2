"""Small parts of the English corpus, in the forms in which they are packed."""

from __future__ import annotations

import gzip
import io
import struct
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path

from mor.data.documents import Document

HEADER = b"X\n" + struct.pack(">iii", 2, 0x40201, 0x20300)
HEADER3 = b"X\n" + struct.pack(">iiii", 3, 0x40201, 0x30500, 5) + b"UTF-8"
NIL = struct.pack(">i", 254)


def chars(text: str | None) -> bytes:
    if text is None:
        return struct.pack(">ii", 9, -1)
    return struct.pack(">ii", 0x40009, len(text.encode())) + text.encode()


def strings(texts: list[str | None], flags: int = 16) -> bytes:
    return struct.pack(">ii", flags, len(texts)) + b"".join(map(chars, texts))


def tagged(name: str, value: bytes) -> bytes:
    return struct.pack(">ii", 0x402, 1) + chars(name) + value


def frame(**columns: bytes) -> bytes:
    values = struct.pack(">ii", 0x313, len(columns)) + b"".join(columns.values())
    class_of = tagged("class", strings(["tbl_df", "data.frame"]))
    return values + class_of + tagged("names", strings(list(columns))) + NIL


def rda(name: str, value: bytes) -> bytes:
    return b"RDX2\n" + HEADER + tagged(name, value) + NIL


def rdb(*values: bytes) -> bytes:
    streams = (HEADER3 + value for value in values)
    return b"".join(struct.pack(">I", len(raw)) + zlib.compress(raw) for raw in streams)


def tar(members: dict[str, bytes], mode: str = "w:xz") -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as archive:  # type: ignore[call-overload]
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def deb(path: Path, members: dict[str, bytes]) -> Path:
    parts = {"debian-binary": b"2.0\n", "control.tar.xz": b"odd", "data.tar.xz": tar(members)}
    raw = b"!<arch>\n"
    for name, data in parts.items():
        head = f"{name:<16}{0:<12}{0:<6}{0:<6}{'100644':<8}{len(data):<10}`\n"
        raw += head.encode() + data + b"\n" * (len(data) % 2)
    path.write_bytes(raw)
    return path


AUSTEN = {
    "./usr/lib/R/site-library/janeaustenr/data/Rdata.rdb": rdb(
        strings(
            ["EMMA", "", "Emma Woodhouse, handsome,", "clever, and rich", None, "", "", "Next."]
        ),
        strings(["PERSUASION", "", "Sir Walter."]),
        struct.pack(">iii", 13, 1, 7),
    )
}
BOOKS = frame(
    gutenberg_id=struct.pack(">iiiii", 13, 3, 36, 36, 1400),
    text=strings(["No one would", "have believed", "My father's name"]),
    title=strings(["The War of the Worlds", "The War of the Worlds", "Great Expectations"]),
)
TIDY = {
    "./usr/lib/R/site-library/tidytext/extdata/books.rda": gzip.compress(rda("books", BOOKS)),
}
WORDNET = {
    "./usr/share/wordnet/data.verb": b"  1 licence\n"
    b"00001740 29 v 02 breathe 0 take_a_breath 0 001 * 0005 v 0000 01 + 02 00 | draw air  \n",
    "./usr/share/wordnet/data.adj": b'00003 00 a 01 able(p) 0 000 | having means; "able to"\n',
}
HTML = (
    "<html><head><title>Not this</title></head><body><h1>A &amp; B</h1><p>One <i>two</i>\n three."
    "<br/>Four</p><script>no()</script></body></html>"
)
ESSAYS = {
    "./usr/share/doc/anarchism/html/append1.html": b"<p>Last</p>",
    "./usr/share/doc/anarchism/html/secA1.html": HTML.encode(),
    "./usr/share/doc/anarchism/html/secAcon.html": b"<p>Contents</p>",
    "./usr/share/doc/anarchism/html/links.html": b"<p>Links</p>",
}
BROWN = {
    "package/ca01": b"\n\n\tThe/at jury/nn said/vbd ``/`` no/at ''/'' ./.\nIt/pps ended/vbd ;/. ;/."
    b"\n\n\tSo/rb (/( they/ppss )/) say/vb 1//nn ,/, or/cc not/* ?/. ?/.\n",
    "package/README": b"about",
}


def pairs(documents: Iterator[Document]) -> list[tuple[str, str]]:
    return [(document.name, document.text) for document in documents]
