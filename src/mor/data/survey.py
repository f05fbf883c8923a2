"""A first look at a source: what documents it holds, which are copies, and a digest of it all."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from mor.data.documents import BadRow, Document, describe_skipped
from mor.data.progress import Progress, no_progress, tell_skipped
from mor.data.sources import iter_rows
from mor.errors import MorError


class SourceChanged(MorError):
    """A source is not what it was when the preparation began: nothing of it can be kept."""


@dataclass
class Survey:
    """The documents of a source that are worth keeping.

    Attributes:
        sizes: UTF-8 bytes of each, by name, in the order of the source.
        sha256: digest (hex) of all names and texts kept.
        num_duplicates: documents left out because their text is exactly that of an earlier one.
        num_empty: documents left out because they hold nothing but white space.
        skipped: rows left out because they give no text, by kind.
    """

    source: str
    text_field: str
    sizes: dict[str, int] = field(default_factory=dict)
    sha256: str = ""
    num_duplicates: int = 0
    num_empty: int = 0
    skipped: dict[str, int] = field(default_factory=dict)
    _digests: dict[str, bytes] = field(default_factory=dict)

    @property
    def num_bytes(self) -> int:
        """UTF-8 bytes of all documents kept."""
        return sum(self.sizes.values())

    def documents(self) -> Iterator[tuple[Document, int]]:
        """Read the source again and yield each document kept, with its size in bytes.

        Raises:
            MorError: as `iter_rows`, and if the source is not what it was in the survey.
        """
        num_read = 0
        for document in iter_rows(self.source, text_field=self.text_field):
            if isinstance(document, BadRow) or document.name not in self.sizes:
                continue
            data = document.text.encode("utf-8")
            if hashlib.sha256(data).digest() != self._digests[document.name]:
                raise SourceChanged(
                    f"{document.name} changed while {self.source} was being prepared"
                )
            num_read += 1
            yield document, len(data)
        if num_read != len(self.sizes):
            raise SourceChanged(f"files went missing while {self.source} was being prepared")

    def read(self, position: Mapping[str, Any] | None = None) -> SurveyReading:
        """Begin a pass over the documents kept."""
        return SurveyReading(self, int(position["documents"]) if position else 0)


class SurveyReading:
    """A pass over a surveyed source (see `mor.data.sources.Reading`)."""

    def __init__(self, survey: Survey, documents: int) -> None:
        """Begin after `documents` of the documents kept."""
        self._survey, self._documents = survey, documents

    def __iter__(self) -> Iterator[Document]:
        """Yield the documents. Raises as `Survey.documents`."""
        for document, _ in islice(self._survey.documents(), self._documents, None):
            self._documents += 1
            yield document

    def position(self) -> Mapping[str, Any]:
        """How many documents have been read."""
        return {"documents": self._documents}


def survey_source(
    source: str, text_field: str, progress: Progress = no_progress, *, skip_bad_rows: bool = False
) -> Survey:
    """Read `source` once.

    Raises:
        BadRow: the first row that gives no text, unless `skip_bad_rows`: then they are counted.
        MorError: as `iter_rows`, and if there is no document with text at all.
    """
    survey = Survey(source, text_field)
    whole, seen, done = hashlib.sha256(), set(), 0
    for document in iter_rows(source, text_field=text_field):
        if isinstance(document, BadRow):
            if not skip_bad_rows:
                raise document
            survey.skipped[document.kind] = survey.skipped.get(document.kind, 0) + 1
            tell_skipped(progress, survey.skipped)
            continue
        data = document.text.encode("utf-8")
        digest = hashlib.sha256(data).digest()
        done += len(data)
        progress("reading", done, None)
        if not document.text.strip():
            survey.num_empty += 1
        elif digest in seen:
            survey.num_duplicates += 1
        else:
            seen.add(digest)
            survey.sizes[document.name] = len(data)
            survey._digests[document.name] = digest
            # Names are file names, which need not be valid Unicode but never hold a zero byte.
            whole.update(document.name.encode("utf-8", "surrogateescape") + b"\0" + digest)
    if not survey.sizes:
        raise MorError(
            f"source {source} holds no text: {survey.num_empty} documents, all of them empty"
            + (f"; {describe_skipped(survey.skipped)}" if survey.skipped else "")
        )
    survey.sha256 = whole.hexdigest()
    return survey
